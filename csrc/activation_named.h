// An activation by the name that the operations take.
#pragma once
#include "activation.h"
#include "torch.h"

namespace dip {

inline int activation_named(const std::string& name) {
  for (int kind = 0; kind < kNumActivations; ++kind)
    if (name == kActivationNames[kind]) return kind;
  STD_TORCH_CHECK(false, "activation: expected relu, gelu, gelu_tanh, silu or tanh, got ", name);
}

}  // namespace dip
