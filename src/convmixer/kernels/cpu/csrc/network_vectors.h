// A whole ConvMixer in fp32, bf16 or int8 with vector instructions; see network_vectors.cpp.
#pragma once
#include "network_run.h"

namespace network {

// Returns the size of the packed weights in words of 4 bytes.
int64_t vectors_size(const Net& net, Precision precision);

// `out` must be all zero.
void vectors_pack(const Net& net, Precision precision, const Plain& plain, int32_t* out);

// images: (N, in_chans, H, W); out: (N, dim), the pooled features.
void vectors_run(const Net& net, Precision precision, const int32_t* weights, const float* images, int64_t N,
                 int64_t H, int64_t W, float* out);

}  // namespace network
