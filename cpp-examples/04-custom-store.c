/* 04-custom-store.c: a store of the engine's own, here a small list in memory. A sequence is
 * preempted into it and comes back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvmgr.h"

#define TRY(call)                                                                    \
  do {                                                                               \
    if ((call) != KVMGR_OK) {                                                        \
      fprintf(stderr, "%s: %s\n", #call, kvmgr_last_error_message());                \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)

/* A real store would lock: the library may call from several threads. This program has one. */
typedef struct object {
  uint8_t key[KVMGR_STORE_KEY_SIZE];
  void *bytes;
  size_t size;
  struct object *next;
} object;

typedef struct list {
  object *first;
  int puts, gets, destroyed;
} list;

static object **find(list *store, const uint8_t *key) {
  object **at = &store->first;
  while (*at && memcmp((*at)->key, key, KVMGR_STORE_KEY_SIZE) != 0) at = &(*at)->next;
  return at;
}

static kvmgr_status list_remove(void *user_data, const uint8_t *key) {
  object **at = find(user_data, key), *gone = *at;
  if (gone) {
    *at = gone->next;
    free(gone->bytes);
    free(gone);
  }
  return KVMGR_OK;
}

static kvmgr_status list_put(void *user_data, const uint8_t *key, const void *bytes, size_t size) {
  list *store = user_data;
  list_remove(store, key);
  object *fresh = malloc(sizeof *fresh);
  void *copy = malloc(size ? size : 1);
  if (!fresh || !copy) {
    free(fresh);
    free(copy);
    return KVMGR_OUT_OF_MEMORY;
  }
  memcpy(fresh->key, key, sizeof fresh->key);
  memcpy(copy, bytes, size);
  fresh->bytes = copy;
  fresh->size = size;
  fresh->next = store->first;
  store->first = fresh;
  ++store->puts;
  return KVMGR_OK;
}

static kvmgr_status list_get(void *user_data, const uint8_t *key, void *out, size_t size) {
  list *store = user_data;
  const object *found = *find(store, key);
  if (!found) return KVMGR_NOT_FOUND;
  if (found->size != size) return KVMGR_STORE_ERROR;
  memcpy(out, found->bytes, size);
  ++store->gets;
  return KVMGR_OK;
}

static kvmgr_status list_contains(void *user_data, const uint8_t *key) {
  return *find(user_data, key) ? KVMGR_OK : KVMGR_NOT_FOUND;
}

static void list_destroy(void *user_data) { ((list *)user_data)->destroyed = 1; }

int main(void) {
  list memory = {NULL, 0, 0, 0};
  kvmgr_store_ops ops = {.struct_size = sizeof ops,
                         .put = list_put,
                         .get = list_get,
                         .contains = list_contains,
                         .remove = list_remove,
                         .destroy = list_destroy};
  kvmgr_store *store = NULL;
  TRY(kvmgr_store_create_custom(&memory, &ops, &store));

  kvmgr_cache_config config = {.struct_size = sizeof config,
                               .num_layers = 1,
                               .num_q_heads = 2,
                               .num_kv_heads = 1,
                               .head_dim = 32,
                               .num_blocks = 16};
  kvmgr_cache *cache = NULL;
  kvmgr_sequence *sequence = NULL;
  TRY(kvmgr_cache_create(&config, &cache));
  TRY(kvmgr_cache_sequence_create(cache, NULL, &sequence));

  static float rows[50 * 32];
  for (int i = 0; i < 50 * 32; ++i) rows[i] = (float)(i % 13);
  kvmgr_tensor tensor = {rows, KVMGR_DTYPE_F32, 3, {50, 1, 32}, {0}, 0, 0};
  TRY(kvmgr_sequence_reserve(sequence, 50));
  TRY(kvmgr_sequence_append(sequence, 0, &tensor, &tensor));
  TRY(kvmgr_sequence_commit(sequence, NULL, 50));

  kvmgr_cache_stats stats = {.struct_size = sizeof stats};
  TRY(kvmgr_sequence_preempt(sequence, store));
  TRY(kvmgr_cache_get_stats(cache, &stats));
  printf("preempted: %d objects in the store, %llu bytes in the cache\n", memory.puts,
         (unsigned long long)stats.bytes_used);
  if (memory.puts != 2 || stats.bytes_used != 0) return 1;
  TRY(kvmgr_sequence_resume(sequence));
  TRY(kvmgr_cache_get_stats(cache, &stats));
  printf("resumed: %d objects read, %llu bytes in the cache\n", memory.gets,
         (unsigned long long)stats.bytes_used);
  if (memory.gets != 2 || stats.bytes_used == 0 || memory.first != NULL) return 1;

  kvmgr_sequence_destroy(sequence);
  kvmgr_cache_release(cache);
  kvmgr_store_release(store);
  return memory.destroyed ? 0 : 1;
}
