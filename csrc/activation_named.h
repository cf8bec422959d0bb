// An activation by the name that the operations take.
#pragma once
#include "activation.h"
#include "torch.h"

namespace dip {

inline int activation_named(const std::string& name) {
  for (int kind = 0; kind < kNumActivations; ++kind)
    if (name == kActivationNames[kind]) return kind;
  std::string known;
  for (const char* each : kActivationNames)
    known += (known.empty() ? "" : ", ") + std::string(each);
  STD_TORCH_CHECK(false, "activation: expected one of ", known, ", got ", name);
}

}  // namespace dip
