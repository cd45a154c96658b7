/* 01-hello.c: a cache, one sequence, five tokens, attention. */
#include <stdio.h>
#include <stdlib.h>

#include "kvmgr.h"

#define TRY(call)                                                                    \
  do {                                                                               \
    if ((call) != KVMGR_OK) {                                                        \
      fprintf(stderr, "%s: %s\n", #call, kvmgr_last_error_message());                \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)

int main(void) {
  enum { LAYERS = 2, Q_HEADS = 4, KV_HEADS = 2, DIM = 64, TOKENS = 5 };
  kvmgr_cache_config config = {.struct_size = sizeof config,
                               .num_layers = LAYERS,
                               .num_q_heads = Q_HEADS,
                               .num_kv_heads = KV_HEADS,
                               .head_dim = DIM};
  config.num_blocks = 64;
  config.spec = "quant(k=had+q4_0, v=q4_0)";

  kvmgr_cache *cache = NULL;
  kvmgr_sequence *sequence = NULL;
  kvmgr_attention *attention = NULL;
  TRY(kvmgr_cache_create(&config, &cache));
  TRY(kvmgr_cache_sequence_create(cache, NULL, &sequence));
  TRY(kvmgr_attention_create(cache, &attention));

  static float k[TOKENS * KV_HEADS * DIM], v[TOKENS * KV_HEADS * DIM];
  static float q[TOKENS * Q_HEADS * DIM], o[TOKENS * Q_HEADS * DIM];
  for (size_t i = 0; i < sizeof k / sizeof *k; ++i) k[i] = v[i] = (float)(i % 7) - 3;
  for (size_t i = 0; i < sizeof q / sizeof *q; ++i) q[i] = (float)(i % 5) - 2;
  kvmgr_tensor key = {k, KVMGR_DTYPE_F32, 3, {TOKENS, KV_HEADS, DIM}, {0}, 0, 0};
  kvmgr_tensor value = {v, KVMGR_DTYPE_F32, 3, {TOKENS, KV_HEADS, DIM}, {0}, 0, 0};
  kvmgr_tensor query = {q, KVMGR_DTYPE_F32, 3, {TOKENS, Q_HEADS, DIM}, {0}, 0, 0};
  kvmgr_tensor output = {o, KVMGR_DTYPE_F32, 3, {TOKENS, Q_HEADS, DIM}, {0}, 0, 0};

  const uint32_t count = TOKENS;
  TRY(kvmgr_sequence_reserve(sequence, TOKENS));
  TRY(kvmgr_attention_plan(attention, &sequence, &count, 1));
  for (uint32_t layer = 0; layer < LAYERS; ++layer) {
    TRY(kvmgr_attention_append(attention, layer, &key, &value, 0, 0));
    TRY(kvmgr_attention_run(attention, layer, &query, &output, NULL, NULL, 0, 0));
  }
  TRY(kvmgr_sequence_commit(sequence, NULL, TOKENS));

  kvmgr_cache_stats stats = {.struct_size = sizeof stats};
  TRY(kvmgr_cache_get_stats(cache, &stats));
  printf("kvmgr %s (%s): o[0] = %.4f, %llu bytes for %d tokens\n", kvmgr_version_string(),
         kvmgr_cpu_level(), o[0], (unsigned long long)stats.bytes_used, TOKENS);

  kvmgr_attention_destroy(attention);
  kvmgr_sequence_destroy(sequence);
  kvmgr_cache_release(cache);
  return 0;
}
