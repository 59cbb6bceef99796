// A whole ConvMixer in bf16 or int8 on the processor's matrix unit; see network_tiles.cpp.
#pragma once
#include "network_run.h"

namespace network {

// Returns whether this build can use the unit and the system allows it. Only then call the functions below.
bool tiles_usable();

// Returns the size of the packed weights in words of 4 bytes.
int64_t tiles_size(const Net& net, Precision precision);

// `out` must be all zero.
void tiles_pack(const Net& net, Precision precision, const Plain& plain, int32_t* out);

// images: (N, in_chans, H, W); out: (N, dim), the pooled features.
void tiles_run(const Net& net, Precision precision, const int32_t* weights, const float* images, int64_t N, int64_t H,
               int64_t W, float* out);

}  // namespace network
