"""A tiny DeepSeek-V4 by Hugging Face in fp32, and the logits it gives, for tests/test_deepseek_v4.py.

pip install torch==2.13.0 transformers==5.23.0 && python scripts/make_tiny_checkpoint.py

Writes tests/data/tiny_deepseek_v4: config.json and model.safetensors under Hugging Face's module names, and
expected.npz. Weights are rounded to bfloat16 before anything is computed, and stored so. All are random, and such that
every one has an effect of order one. The layers come in Flash's order; ``PRO`` puts the same layers into Pro's, which
has no sliding-window layer and begins with two HCA layers.

The prompts are computed one at a time, since padding would be pooled into entries.
"""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "data" / "tiny_deepseek_v4"
SEED = 1
RATIOS = [0, 0, 4, 128, 4]
PRO = [3, 3, 2, 3]
LENGTHS = [300, 269]  # an HCA layer closes two windows in each
GREEDY_PROMPT, GREEDY_NEW = 290, 16

CONFIG = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": len(RATIOS),
    "num_attention_heads": 4,
    "q_lora_rank": 32,
    "o_lora_rank": 16,
    "o_groups": 2,
    "index_n_heads": 16,
    "index_topk": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "swiglu_limit": 1.5,
    "hc_sinkhorn_iters": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
HASH_LAYERS = 2


def main() -> None:
    """Make the checkpoint and what is expected of it."""
    torch.manual_seed(SEED)
    flash = make_model(RATIOS, [layer < HASH_LAYERS for layer in range(len(RATIOS))])
    for name, value in flash.state_dict().items():
        fill(name, value)
    pro = make_model([RATIOS[layer] for layer in PRO], [layer < HASH_LAYERS for layer in PRO])
    state = {name: value for name, value in flash.state_dict().items() if ".layers." not in name}
    for place, layer in enumerate(PRO):
        for name, value in flash.model.layers[layer].state_dict().items():
            state[f"model.layers.{place}.{name}"] = value
    pro.load_state_dict(state)

    prompts = [torch.randint(CONFIG["vocab_size"], (length,)) for length in LENGTHS]
    expected = {f"tokens.{request}": prompt.numpy().astype(np.int32) for request, prompt in enumerate(prompts)}
    for order, model in (("flash", flash), ("pro", pro)):
        for request, prompt in enumerate(prompts):
            expected[f"{order}.logits.{request}"] = logits_of(model, prompt)
    text = prompts[0][:GREEDY_PROMPT]
    for _ in range(GREEDY_NEW):
        text = torch.cat([text, torch.tensor([logits_of(flash, text)[-1].argmax()])])
    expected["flash.greedy"] = text.numpy().astype(np.int32)
    check_effects(flash, prompts[1], expected["flash.logits.1"])
    print({name: value.std() for name, value in expected.items() if ".logits." in name})

    FOLDER.mkdir(parents=True, exist_ok=True)
    flash.config.save_pretrained(FOLDER)
    state = flash.state_dict()
    save_file(
        {name: value.bfloat16() if value.is_floating_point() else value.clone() for name, value in state.items()},
        FOLDER / "model.safetensors",
    )
    np.savez_compressed(FOLDER / "expected.npz", pro_layers=np.array(PRO), **expected)


def make_model(ratios: list[int], hashed: list[bool]) -> DeepseekV4ForCausalLM:
    """A model of these layers, its weights still to be filled in."""
    config = DeepseekV4Config(
        **copy.deepcopy(CONFIG) | {"num_hidden_layers": len(ratios)},
        compress_ratios=ratios,
        mlp_layer_types=["hash_moe" if by_table else "moe" for by_table in hashed],
    )
    config._attn_implementation = config._experts_implementation = "eager"
    return DeepseekV4ForCausalLM(config).float().eval()


def fill(name: str, value: torch.Tensor) -> None:
    """Random numbers into one weight, representable in bfloat16."""
    noise = torch.randn(value.shape)
    if name.endswith("tid2eid"):
        noise = torch.rand(len(value), CONFIG["n_routed_experts"]).argsort(dim=1)[:, : value.shape[1]]
    elif "norm" in name or "scale" in name:
        noise = 1 + 0.25 * noise
    elif "e_score_correction_bias" in name:
        noise = 0.2 * noise
    elif "embed_tokens" not in name and "position_bias" not in name and value.ndim > 1:
        # An average over a hundred rows is small: the gain brings it back to the size of the residual streams.
        noise = noise * (4.0 if "o_b_proj" in name else 1.0) / math.sqrt(value.shape[-1])
    value.copy_(noise.bfloat16() if value.is_floating_point() else noise)


@torch.no_grad()
def check_effects(model: DeepseekV4ForCausalLM, tokens: torch.Tensor, expected: np.ndarray) -> None:
    """Assert that other numbers in any one weight give other logits, by far more than a test tolerates."""
    effects = {}
    for name, value in model.state_dict().items():
        kept = value.clone()
        value.copy_((kept + 1) % CONFIG["n_routed_experts"] if name.endswith("tid2eid") else kept + 0.1 * kept.flip(0))
        effects[name] = float(np.abs(model(tokens[None], use_cache=False).logits[0].numpy() - expected).max())
        value.copy_(kept)
    weakest = sorted(effects, key=effects.__getitem__)[:5]
    print("smallest effects:", {name: effects[name] for name in weakest})
    assert effects[weakest[0]] > 1e-3


@torch.no_grad()
def logits_of(model: DeepseekV4ForCausalLM, tokens: torch.Tensor) -> np.ndarray:
    """fp32 [tokens, vocabulary]. Asserts that rounding decides no choice of entries or experts."""
    gaps = []

    def gap(scores: torch.Tensor, count: int) -> None:
        if scores.shape[-1] > count:
            best = scores.sort(dim=-1, descending=True).values
            chosen = best[..., count - 1] - best[..., count]
            gaps.append(chosen[best[..., count] > -math.inf].min().item())

    def index_gap(module, arguments, scores):
        positions = torch.arange(scores.shape[1])
        hidden = torch.arange(scores.shape[2]) >= (positions[:, None] + 1) // 4
        gap(scores.masked_fill(hidden, -math.inf), CONFIG["index_topk"])

    def router_gap(module, arguments, output):
        scores = module.score_fn(output[0])
        gap(scores + module.e_score_correction_bias, CONFIG["num_experts_per_tok"])

    hooks = [
        module.register_forward_hook(index_gap if name == "DeepseekV4IndexerScorer" else router_gap)
        for module in model.modules()
        if (name := type(module).__name__) in ("DeepseekV4IndexerScorer", "DeepseekV4TopKRouter")
    ]
    result = model(tokens[None], use_cache=False).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    best = np.sort(result, axis=-1)
    print(f"smallest gap of a choice {min(gaps):.1e}, of the likeliest token {(best[:, -1] - best[:, -2]).min():.1e}")
    assert min(gaps) > 1e-5
    return result


if __name__ == "__main__":
    main()
