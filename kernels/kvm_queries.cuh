// Q as attention over sealed rows wants it: right operands in f16, brought to about 1 by a power of two for
// each column, rotated where keys are kept rotated; and what products with them are put right with.
//
// Each warp has it in registers. Where they are too few for it, Q is in shared memory, once for a CTA.
#pragma once
#include "kvm_quant.cuh"

/// What a right operand gives with middle codes, exactly as the tensor cores see it: sums of its columns,
/// times what fragments add.
template <class F, int STEPS, int NT, class Right>
KVM_DEVICE void kvm_middle_products(const Right& right, float (&acc)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; n++) {
        for (int r = 0; r < 4; r++) acc[n][r] = 0;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const u32 a[4] = {F::middle(step, 0), F::middle(step, 1), F::middle(step, 2), F::middle(step, 3)};
            u32 b[2];
            kvm_get_q(right, step, n, b);
            kvm_mma<false>(acc[n], a, b);
        }
    }
}

/// Fragments of 1.
struct KvmOnes {
    KVM_DEVICE static constexpr u32 middle(int, int) { return 0x3c003c00; }
};

/// Whether Q is in shared memory.
template <int D, int NT> static constexpr bool KVM_SHARES_Q = kvm_q_bytes(D, NT) > 0;

/// What belongs to a column of Q: `gain` turns its products into logits in units of log2. Where keys are
/// scaled by token: its sum, if there are minima, and its products with middle codes.
struct alignas(16) KvmQueryColumn {
    float gain, sum, middle[2];
};

/// Q as right operands in f16, with the columns that this lane has of results.
template <int D, int NT, bool IS_SHARED = KVM_SHARES_Q<D, NT>> struct KvmQueries {
    u32 b[D / 16][NT][2];
    KvmQueryColumn columns[NT][2];
    KVM_DEVICE const KvmQueryColumn& column(int n, int c) const { return columns[n][c]; }
};
template <int D, int NT> struct KvmQueries<D, NT, true> {
    KvmSharedQ<NT> b;
    KvmQueryColumn* columns; // of all lanes
    KVM_DEVICE const KvmQueryColumn& column(int n, int c) const {
        return columns[n * 8 + kvm_tid() % 4 * 2 + c];
    }
};

/// Elements of a pair a and b whose numbers differ in a bit, one step of a rotation.
KVM_DEVICE void kvm_butterfly(float& a, float& b) {
    float sum = a + b;
    b = a - b, a = sum;
}
/// The same where the other one is in the lane that `mask` tells apart.
KVM_DEVICE float kvm_butterfly(float x, u32 mask) {
    float other = kvm_shfl_xor(x, (int)mask);
    return x * (kvm_tid() & mask ? -1.0f : 1.0f) + other; // one instruction, and exact
}

/// What the lanes of column lane / 4 have, for column `c` of the two that this lane has of results.
KVM_DEVICE float kvm_of_column(float x, int c) {
    return kvm_float(kvm_shfl(kvm_bits(x), (kvm_tid() % 4 * 2 + c) * 4));
}

/// Brings the columns of a right operand to about 1, rotated if keys are, as f16. Answers for column
/// lane / 4 what turns products into logits.
template <int D> KVM_DEVICE float kvm_prepare_columns(const KvmDecode& p, u32 (&b)[D / 16][1][2]) {
    constexpr int N = D / 4; // elements of a column in a lane; its four lanes have pairs in turn
    float x[N / 2][2], top = 0, unit = p.scale * KVM_LOG2E;
    if (p.is_bf16) {
#pragma unroll
        for (int i = 0; i < N / 2; i++) kvm_unpack_pair<true>(b[i / 2][0][i % 2], x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < N / 2; i++) kvm_unpack_pair<false>(b[i / 2][0][i % 2], x[i]);
    }
    if (p.rotates & 1) {
#pragma unroll
        for (int half = 1; half < N; half *= 2)
#pragma unroll
            for (int i = 0; i < N; i++)
                if (!(i & half)) kvm_butterfly(x[i / 2][i % 2], x[(i + half) / 2][(i + half) % 2]);
#pragma unroll
        for (int i = 0; i < N; i++)
            x[i / 2][i % 2] = kvm_butterfly(kvm_butterfly(x[i / 2][i % 2], 1), 2);
        unit *= kvm_rotation_factor<D>();
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        float y = x[i / 2][i % 2], size = y < 0 ? -y : y;
        top = size > top ? size : top;
    }
    top = kvm_max_over<1, 4>(top); // the lanes of a column
    // 2^e of the largest element; where that is 0, or not finite, nothing is gained.
    u32 e = kvm_bits(top) >> 23;
    e = e == 0 || e >= 254 ? 127 : e;
    float scale = kvm_float((254 - e) << 23);
#pragma unroll
    for (int i = 0; i < N / 2; i++)
        b[i / 2][0][i % 2] = kvm_pack<false>(x[i][0] * scale, x[i][1] * scale);
    return kvm_float(e << 23) * unit;
}

/// The rest of what belongs to the columns of a right operand.
template <class F, int D, int NT>
KVM_DEVICE void kvm_sum_columns(const u32 (&b)[D / 16][NT][2], KvmQueryColumn (&columns)[NT][2]) {
    if constexpr (F::IS_PER_CHANNEL) return;
    float sum[NT][4] = {}, middle[NT][4] = {};
    if constexpr (F::FLOATS == 2) kvm_middle_products<KvmOnes, D / 16>(b, sum);
    if constexpr (F::HAS_OFFSET) kvm_middle_products<F, D / 16>(b, middle);
    for (int n = 0; n < NT; n++)
        for (int c = 0; c < 2; c++) {
            columns[n][c].sum = sum[n][c];
            columns[n][c].middle[0] = middle[n][c], columns[n][c].middle[1] = middle[n][c + 2];
        }
}

/// Q of an item. `shared` is where it is in shared memory, if it is: right operands, then columns.
template <class F, int D, int NT, int WARPS>
KVM_DEVICE void kvm_prepare_q(const KvmDecode& p, const KvmItem& it, u32* shared, KvmQueries<D, NT>& q) {
    u32 lane = kvm_tid() % 32;
    if constexpr (KVM_SHARES_Q<D, NT>) {
        q.b = {shared}, q.columns = (KvmQueryColumn*)(shared + kvm_q_bytes(D, NT) / 4);
        for (u32 n = kvm_tid() / 32; n < NT; n += WARPS) {
            u32 b[D / 16][1][2];
            KvmQueryColumn columns[1][2];
            kvm_load_q<D, 1>(p, it, b, n * 8);
            float gain = kvm_prepare_columns<D>(p, b);
            kvm_sum_columns<F, D, 1>(b, columns);
            for (int c = 0; c < 2; c++) {
                columns[0][c].gain = kvm_of_column(gain, c);
                if (lane < 4) q.columns[n * 8 + lane * 2 + c] = columns[0][c];
            }
#pragma unroll
            for (int i = 0; i < D / 8; i++)
                shared[((i / 2 * NT + n) * 2 + i % 2) * 32 + lane] = b[i / 2][0][i % 2];
        }
        kvm_sync();
    } else {
        kvm_load_q<D, NT>(p, it, q.b);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            u32 b[D / 16][1][2];
#pragma unroll
            for (int i = 0; i < D / 8; i++) b[i / 2][0][i % 2] = q.b[i / 2][n][i % 2];
            float gain = kvm_prepare_columns<D>(p, b);
#pragma unroll
            for (int i = 0; i < D / 8; i++) q.b[i / 2][n][i % 2] = b[i / 2][0][i % 2];
            for (int c = 0; c < 2; c++) q.columns[n][c].gain = kvm_of_column(gain, c);
        }
        kvm_sum_columns<F, D, NT>(q.b, q.columns);
    }
}
