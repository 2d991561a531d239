// A step's plan and what it says of tokens and requests.
#pragma once

#include <cstdint>

#include "layout/kinds.h"

namespace dsv4 {

// The most windows of `ratio` tokens that a step can close.
DSV4_HOST_DEVICE int closing_capacity(int tokens, int requests, int ratio) {
  return (tokens + (ratio - 1) * requests) / ratio;
}

// A step's plan: the packed int32 vector of dsv4_jax/layout/plan.py, field after field.
struct Plan {
  const int32_t* packed;
  int tokens;
  int requests;

  // Whether closing fields have a place for every token, place i for token i, -1 unless it closes a window. Else the
  // closing tokens lie together in order. Says nothing of how many tokens a request brings.
  DSV4_HOST_DEVICE bool closings_by_token() const { return tokens == requests; }
  DSV4_HOST_DEVICE int table_changes() const { return tokens / kBlockTokens + requests; }
  DSV4_HOST_DEVICE const int32_t* token_slot() const { return packed; }
  DSV4_HOST_DEVICE const int32_t* token_position() const { return token_slot() + tokens; }
  DSV4_HOST_DEVICE const int32_t* token_request() const { return token_position() + tokens; }
  DSV4_HOST_DEVICE const int32_t* request_slot() const { return token_request() + tokens; }
  DSV4_HOST_DEVICE const int32_t* request_reset() const { return request_slot() + requests; }
  DSV4_HOST_DEVICE const int32_t* query_start() const { return request_reset() + requests; }
  DSV4_HOST_DEVICE const int32_t* table_slot() const { return query_start() + requests + 1; }
  DSV4_HOST_DEVICE const int32_t* table_index() const { return table_slot() + table_changes(); }
  DSV4_HOST_DEVICE const int32_t* table_block() const { return table_index() + table_changes(); }
  // The closing tokens of the kind of this ratio; kinds follow each other as in their table.
  DSV4_HOST_DEVICE const int32_t* closing(int ratio) const {
    constexpr KindTable table{};
    const int32_t* field = table_block() + table_changes();
    for (const Kind& kind : table.rows) {
      if (kind.ratio == ratio) break;
      field += closing_capacity(tokens, requests, kind.ratio);
    }
    return field;
  }
  DSV4_HOST_DEVICE const int32_t* longest() const { return closing(0); }  // behind those of every kind
  DSV4_HOST_DEVICE int64_t size() const { return longest() + 1 - packed; }
};

// One token of a step and the request it belongs to. `valid` is false for padding and for anything out of range.
struct Token {
  bool valid;
  int slot;
  int position;
  int start;  // position of the request's first token of this step
  int next;   // the request's position after this step
};

// Token `index` of the step, of a request whose tokens are first .. end - 1.
DSV4_HOST_DEVICE Token token_of(const Plan& plan, int index, int slot, int position, int first, int end) {
  Token token{false, slot, position, position - (index - first), position + (end - index)};
  token.valid = first >= 0 && first <= index && index < end && end <= plan.tokens && token.start >= 0;
  return token;
}

DSV4_HOST_DEVICE Token token_at(const Plan& plan, int index, int slots) {
  const Token none{false, -1, -1, -1, -1};
  if (index < 0 || index >= plan.tokens) return none;
  const int slot = plan.token_slot()[index], position = plan.token_position()[index];
  const int request = plan.token_request()[index];
  if (slot < 0 || slot >= slots || position < 0 || request < 0 || request >= plan.requests) return none;
  return token_of(plan, index, slot, position, plan.query_start()[request], plan.query_start()[request + 1]);
}

// One request of a step, by its place in the plan.
struct Request {
  bool valid;
  int slot;
  int start;
  int next;
};

DSV4_HOST_DEVICE Request request_at(const Plan& plan, int index, int slots) {
  Request request{false, plan.request_slot()[index], -1, -1};
  const int first = plan.query_start()[index], end = plan.query_start()[index + 1];
  if (request.slot < 0 || request.slot >= slots || first < 0 || first >= end || end > plan.tokens) return request;
  request.start = plan.token_position()[first];
  request.next = request.start + (end - first);
  request.valid = request.start >= 0 && plan.token_slot()[first] == request.slot;
  return request;
}

}  // namespace dsv4
