"""Plans, layouts, managers and errors pass through pickle and copy, new or used, and mean the same afterwards."""

import copy
import importlib
import inspect
import pickle
import pkgutil

import jax
import numpy as np
import pytest
from managers import grow, make_manager, state

import dsv4_jax
from dsv4_jax.host.errors import CacheError, CacheFull, CannotTruncate, ContextExceeded, StalePlan, UnknownRequest
from dsv4_jax.host.planning import build_plan
from dsv4_jax.host.receipts import Receipts
from dsv4_jax.layout.plan import PlanLayout
from dsv4_jax.native.compatibility import NativeModuleError

COPIES = {
    **{f"pickle {protocol}": lambda x, p=protocol: pickle.loads(pickle.dumps(x, p)) for protocol in range(2, 6)},
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
COPIED = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


def package_errors() -> list[type]:
    """Every exception that a module of the package defines."""
    found = set()
    for module in pkgutil.walk_packages(dsv4_jax.__path__, "dsv4_jax."):
        if module.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, BaseException) and value.__module__ == module.name:
                found.add(value)
    return sorted(found, key=lambda error: error.__name__)


def made(error: type) -> BaseException:
    """One of them, its arguments made up by the parameters of its ``__init__``."""
    if "__init__" not in vars(error):
        return error("what was asked, what is there", "and more")
    parameters = list(inspect.signature(error).parameters.values())
    return error(
        *([7, 8] if "Sequence" in str(p.annotation) else "slots" if p.annotation == "str" else 3 for p in parameters)
    )


@COPIED
@pytest.mark.parametrize("error", package_errors())
def test_every_error_of_the_package(error, copied):
    if issubclass(error, SystemExit):
        pytest.skip("ends the process, never crosses to another")
    original = made(error)
    original.add_note("while serving")
    again = copied(copied(original))
    assert type(again) is error
    assert str(again) == str(original)
    assert again.args == original.args
    assert {k: v for k, v in vars(again).items() if k != "_made_of"} == {
        k: v for k, v in vars(original).items() if k != "_made_of"
    }


@COPIED
def test_errors_keep_what_they_say(copied):
    full = copied(CacheFull("blocks", 4, 1, 3))
    assert (full.resource, full.needed, full.free, full.total) == ("blocks", 4, 1, 3)
    assert copied(UnknownRequest(np.array([5, 6]))).requests == (5, 6)
    assert copied(ContextExceeded(1, 2, 3, 4)).max_context == 4
    assert copied(CannotTruncate(1, 9, 4, 7, "gone")).lowest == 7
    native = copied(NativeModuleError("It is missing.", command="mend"))
    assert (native.problem, native.command, native.name) == ("It is missing.", "mend", "dsv4_jax_native")
    assert isinstance(native, ImportError)


@COPIED
def test_a_layout_new_and_used(copied):
    for layout in (PlanLayout(64, 4), PlanLayout(64, 64, "abc")):
        for _ in range(2):
            again = copied(layout)
            assert again == layout
            assert hash(again) == hash(layout)
            assert again.fields == layout.fields
            assert again.size == layout.size


@COPIED
def test_a_plan(copied):
    plan = build_plan(PlanLayout(8, 4), [3, 0], [9, 0], [3, 1], [False, True])
    again = copied(plan)
    np.testing.assert_array_equal(again.packed, plan.packed)
    np.testing.assert_array_equal(again.token_slot, plan.token_slot)
    assert again.layout == plan.layout
    assert jax.tree.structure(again) == jax.tree.structure(plan)


@COPIED
@pytest.mark.parametrize("steps", [None, 3])
def test_a_copy_of_a_manager_goes_on_like_the_original(copied, steps):
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    grow(manager, one, 303)
    manager.truncate(one, 302)
    cancelled = manager.prepare_forward({two: 4})
    manager.cancel(cancelled)
    plan = manager.prepare_forward({two: 40, one: 5}, steps=steps)
    again, untouched = copied(manager), state(manager)
    # The plan, and a copy of it, mean to the copy what they mean to the original.
    for known in (plan, copied(plan)):
        other = copied(again)
        other.cancel(known)
        assert (other.length(one), other.length(two)) == (302, 0)
        assert other.prepare_forward({two: 1}).request_reset[0] == 1
        with pytest.raises(StalePlan, match="cancelled before"):
            other.cancel(known)
    with pytest.raises(StalePlan, match="cancelled before"):
        again.cancel(cancelled)
    again.release(two)
    assert state(manager) == untouched
    manager.commit(copied(plan), 1)
    assert manager.length(two) == 40
    with pytest.raises(StalePlan, match="committed before"):
        manager.cancel(plan)


def test_a_plan_is_not_mistaken_for_one_that_a_copy_made_at_the_same_time():
    manager = make_manager()
    request = manager.admit()
    manager.prepare_forward({request: 10})
    twin = pickle.loads(pickle.dumps(manager))
    mine, its = manager.prepare_forward({request: 1}), twin.prepare_forward({request: 1})
    for owner, plan, stranger in ((manager, mine, its), (twin, its, mine)):
        with pytest.raises(StalePlan, match="not a plan of this manager"):
            owner.cancel(stranger)
        owner.cancel(plan)
        assert owner.length(request) == 10


def test_a_manager_survives_a_restart_with_its_plans(tmp_path):
    manager = make_manager()
    request = manager.admit()
    plan = manager.prepare_forward({request: 200}, steps=2)
    (tmp_path / "saved").write_bytes(pickle.dumps((manager, plan)))
    del manager
    manager, plan = pickle.loads((tmp_path / "saved").read_bytes())
    manager.commit(plan, 1)
    assert manager.length(request) == 200
    with pytest.raises(StalePlan, match="committed before"):
        manager.cancel(plan)


def test_a_copy_of_an_interrupted_manager_is_finished():
    manager = make_manager()
    manager._journal._noted = manager._request_table.admit()[1]
    assert len(copy.deepcopy(manager).requests) == 1


def test_a_copied_plan_pickles_without_its_manager():
    manager = make_manager(blocks=4000, slots=40)
    plan = manager.prepare_forward({manager.admit(): 8})
    assert len(pickle.dumps(plan)) < plan.packed.nbytes + 1000


def test_what_was_settled_is_forgotten_only_once_it_is_stale_anyway():
    manager = make_manager()
    one, two = manager.admit(), manager.admit()
    manager.prepare_forward({one: 4, two: 4})
    plans = []
    for _ in range(1200):
        plans.append(manager.prepare_forward({one: 1}))
        manager.cancel(plans[-1])
        manager.commit(manager.prepare_forward({two: 1}, steps=2), 0)
    assert len(manager._receipts._settled) < 5000
    manager.prepare_forward({one: 1})
    for plan in plans:
        with pytest.raises(StalePlan, match="cancelled before"):
            manager.cancel(plan)
    manager.truncate(one, 0)
    manager.release(two)
    manager.prepare_forward({one: 4})
    for _ in range(2500):
        manager.cancel(manager.prepare_forward({one: 1}))
        manager.commit(manager.prepare_forward({one: 1}, steps=2), 0)
    assert len(manager._receipts._settled) < 2500
    for plan in plans[::100]:
        with pytest.raises(CacheError):
            manager.cancel(plan)


def test_names_of_the_past_are_forgotten_once_no_plan_of_theirs_matters():
    receipts = Receipts()
    for now in range(100):
        receipts.rename(last=now, oldest=now - 3)
    assert len(receipts._former_names) <= 4
