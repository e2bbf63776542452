#pragma once
// mma.sync and ldmatrix: 16-row products with operands in registers. In the comments t is the lane.
#include "fp8/types.cuh"

// Four 8x8 matrices of 16-bit values (or 8 rows of 16 bytes): lane t gives the address of row t % 8 of matrix t / 8 and
// gets bytes 4 (t % 4) .. + 3 of row t / 4 of each.
DEVICE void ldmatrix_x4(u32 address, u32 (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// The same, each matrix transposed as 16-bit values: lane t gets rows 2 (t % 4) and + 1 of column t / 4.
DEVICE void ldmatrix_x4_trans(u32 address, u32 (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// An 8x8 matrix of 16-bit values, lane t holding columns 2 (t % 4) and + 1 of row t / 4, transposed.
DEVICE u32 movmatrix_trans(u32 x) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

// d += a b^T. d: rows t / 4 (d[0], d[1]) and t / 4 + 8 (d[2], d[3]), columns 2 (t % 4) + {0, 1}.
// a: rows t / 4 (a[0], a[2]) and t / 4 + 8 (a[1], a[3]); b: row t / 4. One register holds the summed index
// 4 (t % 4) .. + 3 (+ 16 in a[2], a[3], b1) in e4m3, 2 (t % 4) + {0, 1} (+ 8) in 16 bits.
template <int Dtype> DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (Dtype == 0)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
