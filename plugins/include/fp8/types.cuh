#pragma once
// Short names for the built-in types; every device helper is forced inline.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__

// An opaque CUtensorMap (cuda.h does not compile under NVRTC); pass as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap { u8 bytes[128]; };

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void* shared_pointer(u32 address) { return __cvta_shared_to_generic(address); }
