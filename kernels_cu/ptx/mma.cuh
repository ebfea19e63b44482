// mma.sync: one warp multiplies A (16 x k) by B (k x 8) into float32 C (16 x 8). PTX ISA 9.7.14.5.
// With g = lane / 4 and t = lane % 4:
//   C: c0, c1 = (g, 2t), (g, 2t+1);  c2, c3 = the same columns of row g + 8
//   A, 16-bit, k = 16: a0 = (g, 2t..), a1 = (g+8, 2t..), a2 = (g, 2t+8..), a3 = (g+8, 2t+8..), two elements each
//   B, 16-bit, k = 16: b0 = (k = 2t.., n = g), b1 = (k = 2t+8.., n = g)
//   A, tf32, k = 8:    a0 = (g, t), a1 = (g+8, t), a2 = (g, t+4), a3 = (g+8, t+4);  B: b0 = (t, g), b1 = (t+4, g)
// Every step therefore spans 32 bytes of k, whatever the element.
#pragma once
#include "types.cuh"

CUFLASH_DEVICE void mma_m16n8k16_f16(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CUFLASH_DEVICE void mma_m16n8k16_bf16(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Turing has k = 8 only: the two halves of a k = 16 fragment, one after the other.
CUFLASH_DEVICE void mma_m16n8k8_f16_twice(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
}

CUFLASH_DEVICE void mma_m16n8k8_tf32(float (&c)[4], u32 const (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
