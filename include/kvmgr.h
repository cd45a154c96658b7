/*
 * kvmgr.h: the KV cache of an LLM inference engine.
 *
 * Six handles are useful alone, five of them compose in a seventh:
 *   kvmgr_pool       block bookkeeping without memory: block tables, forks, prefix sharing
 *   kvmgr_policy     which tokens stay: scores and keep sets from what the engine observed
 *   kvmgr_quantizer  encode, decode, dot and axpy of rows of keys or values
 *   kvmgr_store      a place for sealed blocks: host memory or the engine's own
 *   kvmgr_attention  plan and run attention over block tables and quantized blocks
 *   kvmgr_slots      the KV memory of a layer for an engine that addresses it by slot, under a mask
 *   kvmgr_cache      all of it as one, configured by one line of text, the spec:
 *                    snapkv(w=64) | adakv(0.2) | keep(0.25) | quant(k=had+q4_0, v=q4_0)
 *
 * One step of an engine:
 *   kvmgr_sequence_reserve(sequence, n)                    for each sequence of the batch
 *   kvmgr_attention_plan(attention, sequences, n's, ...)   once
 *   kvmgr_attention_append(...), kvmgr_attention_run(...)  for each layer
 *   kvmgr_sequence_commit(sequence, tokens, n)             for each sequence
 *   kvmgr_sequence_end_prefill(sequence)                   once, after the prompt
 *
 * Errors: every call that can fail answers a kvmgr_status, 0 for success.
 * kvmgr_last_error_message() says which argument, which value and which limit. On failure handle
 * outputs are NULL, other outputs are untouched, and objects are as they were.
 *
 * Ownership: shared handles (pool, cache, policy, quantizer, store) are made with one reference
 * and end with the last release. Exclusive handles (sequence, attention, slots) and kvmgr_meeting end
 * with destroy.
 * Children keep their parents alive. The library copies what it is given; it never frees or keeps
 * the caller's memory beyond a call, except the user_data of callbacks. A stale or foreign handle
 * is answered with KVMGR_INVALID_HANDLE.
 *
 * Threads: shared handles may be used from any thread at any time. An exclusive handle is used by
 * one thread at a time, whichever; a second one gets KVMGR_BUSY.
 *
 * Structs whose first field is struct_size grow at the end in later versions: set it to sizeof,
 * set everything else to zero, then what you need.
 */


#ifndef KVMGR_H
#define KVMGR_H

/* Generated from src/ffi by cbindgen. Do not edit: run BLESS=1 cargo test --test header */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__cplusplus) && __cplusplus >= 201703L
#define KVMGR_NODISCARD [[nodiscard]]
#elif defined(__GNUC__) || defined(__clang__)
#define KVMGR_NODISCARD __attribute__((warn_unused_result))
#else
#define KVMGR_NODISCARD
#endif

/**
 * Major version of the library this header belongs to.
 */
#define KVMGR_VERSION_MAJOR 0

/**
 * Minor version; before 1.0 it changes whenever the ABI breaks.
 */
#define KVMGR_VERSION_MINOR 1

/**
 * Patch version.
 */
#define KVMGR_VERSION_PATCH 0

/**
 * Bytes of a key of a store.
 */
#define KVMGR_STORE_KEY_SIZE 32

/**
 * The policy reads keys.
 */
#define KVMGR_NEEDS_KEYS 1

/**
 * The policy reads values.
 */
#define KVMGR_NEEDS_VALUES 2

/**
 * The policy reads the last queries of each head.
 */
#define KVMGR_NEEDS_QUERY_WINDOW 4

/**
 * The policy reads attention probabilities summed over queries.
 */
#define KVMGR_NEEDS_COLUMN_SUM 8

/**
 * The policy needs to know how the model rotates keys.
 */
#define KVMGR_NEEDS_ROPE 16

/**
 * The policy reads mean and covariance of the queries before rotation.
 */
#define KVMGR_NEEDS_QUERY_STATISTICS 32

/**
 * The policy reads the input of attention in each layer: kvmgr_sequence_observe.
 */
#define KVMGR_NEEDS_HIDDEN 64

/**
 * The policy reads the output projections: kvmgr_cache_set_weights.
 */
#define KVMGR_NEEDS_OUTPUT_PROJECTION 128

/**
 * The prompt has to be read a second time: kvmgr_sequence_replay.
 */
#define KVMGR_NEEDS_REPLAY 256

/**
 * The policy reads hidden states of the tokens that do so: kvmgr_sequence_observe.
 */
#define KVMGR_NEEDS_REPLAY_HIDDEN 512

/**
 * The policy reads how many queries gave a token less than an even share.
 */
#define KVMGR_NEEDS_LOW_COUNT 1024

/**
 * The policy reads how much attention changes the residual stream: kvmgr_sequence_observe_residual.
 */
#define KVMGR_NEEDS_RESIDUAL 4096

/**
 * Flag: the score acts after each decode step too, not only when the prompt ends.
 */
#define KVMGR_SCORE_EACH_STEP 1

/**
 * Flag: full blocks are kept after their sequence ends and shared by prefix.
 */
#define KVMGR_POOL_PREFIX 1

/**
 * Flag: a full block whose prefix is cached already gives way to that one, so the block tables of
 * sequences change behind their end. Without it they only grow.
 */
#define KVMGR_POOL_DEDUP 2

/**
 * Flag: a prompt that parts from all cached ones within a block copies the rows before. Costs 4
 * bytes for each token of the pool. One full or latent group only.
 */
#define KVMGR_POOL_PARTIAL 4

/**
 * Flag: operations and decisions are recorded, see kvmgr_pool_take_log. Lookups then wait for one
 * another.
 */
#define KVMGR_POOL_LOG 8

/**
 * Flag: blocks that are handed out with the bytes of a sequence before are listed, so that the
 * engine can wipe or poison them first: kvmgr_pool_take_recycled.
 */
#define KVMGR_POOL_RECYCLED 16

/**
 * In a block table: the group keeps no block here.
 */
#define KVMGR_NO_BLOCK UINT32_MAX

/**
 * Flag of kvmgr_pool_listen: events as arrays by position instead of maps by name.
 */
#define KVMGR_EVENTS_ARRAYS 1

/**
 * Flag: full blocks are kept after their sequence ends and shared by prefix.
 */
#define KVMGR_CACHE_PREFIX 1

/**
 * Flag: values are the first value_dim elements of keys, and nothing is stored for them. That is MLA
 * (DeepSeek-V2, arXiv 2405.04434) in its absorbed form: one KV head, a key is the latent (512 elements)
 * and the rotated part (64), all query heads attend to it, and a value is the latent. The engine's scale
 * is not 1 / sqrt(head_dim) then: say it in kvmgr_attention_options. Keys and values have one format, and
 * stages that change values are refused.
 */
#define KVMGR_CACHE_VALUES_IN_KEYS 2

/**
 * Flag: sequences that start with the same blocks do not attend to them together but each for itself,
 * so that results do not depend on what else is planned. Equal for all workers of a run.
 */
#define KVMGR_ATTENTION_NO_CASCADE 1

/**
 * Flag: the prefill phase of the policy also runs before each further piece of a prompt, instead
 * of only when the prompt has ended.
 */
#define KVMGR_SLOTS_PIECES 1

/**
 * Flag of a write: other values for the tokens that are there, such as keys rotated to other
 * positions. Slots that are absent or evicted stay so.
 */
#define KVMGR_SLOTS_SAME_TOKENS 1

/**
 * The slot was never written.
 */
#define KVMGR_SLOT_ABSENT 0

/**
 * The slot holds a token.
 */
#define KVMGR_SLOT_LIVE 1

/**
 * The token of the slot was evicted and the slot was not written since.
 */
#define KVMGR_SLOT_EVICTED 2

/**
 * Plans and runs attention. kvmgr_attention_plan wants the handle alone; append and run may be
 * called by many workers at once. A thread that breaks this gets KVMGR_BUSY.
 */
typedef struct kvmgr_attention kvmgr_attention;

/**
 * The KV cache of a model: block memory, formats, policies, prefix sharing and offload as one.
 * Shared: retain and release, any thread.
 */
typedef struct kvmgr_cache kvmgr_cache;

/**
 * Cached blocks that are held apart from any sequence: what a lookup found, or a pin. They are
 * neither reclaimed nor changed until the lease is destroyed or its deadline passes, whichever is
 * first. Exclusive: destroy once. A lease keeps its pool alive.
 */
typedef struct kvmgr_lease kvmgr_lease;

/**
 * Where the workers of one attention meet: with it, kvmgr_slots_attend and kvmgr_attend_dense split
 * a few queries over many rows by rows, and not only by KV heads. Calls that use it at the same time
 * must be the workers of one attention, with the same num_workers; the next attention may use it
 * when all of them have returned.
 */
typedef struct kvmgr_meeting kvmgr_meeting;

/**
 * A token policy parsed from a spec. Immutable. Shared: retain and release, any thread.
 */
typedef struct kvmgr_policy kvmgr_policy;

/**
 * A paged block allocator with reference counts, copy-on-write forks and a prefix index, for an
 * engine whose keys and values are in its own memory. Shared: retain and release, any thread.
 * Calls on one pool wait for one another; kvmgr_pool_lookup runs beside itself.
 *
 * One step of an engine, with one call for all its sequences:
 *   kvmgr_pool_admit(requests)        new prompts: what is cached, blocks for the rest
 *   kvmgr_pool_take_copies            copies to make before anything is written
 *   kvmgr_pool_slot_mapping           where the rows of reserved tokens go
 *   ... the engine computes ...
 *   kvmgr_pool_commit(prompt pieces)  what has been written can be found by others
 *   kvmgr_pool_append(tokens)         commits one token of each and reserves the next
 *   kvmgr_pool_end(sequences)         blocks stay cached until somebody needs their place
 */
typedef struct kvmgr_pool kvmgr_pool;

/**
 * The numeric format of keys or of values. Immutable. Shared: retain and release, any thread.
 */
typedef struct kvmgr_quantizer kvmgr_quantizer;

/**
 * The tokens of one request and the rows that are kept of them. Exclusive: one thread at a time,
 * any thread; a second one gets KVMGR_BUSY.
 *
 * The life of a step: reserve n tokens, append K and V to every layer, attend, commit. Every
 * failing call leaves the sequence as it was, unless it says otherwise.
 */
typedef struct kvmgr_sequence kvmgr_sequence;

/**
 * The keys and values of one layer, addressed by slot. For engines that give every cached token a
 * number, reuse numbers, and hand over a mask instead of sequences. Exclusive, except that
 * kvmgr_slots_read and kvmgr_slots_attend may be called by many workers at once. A thread that
 * breaks this gets KVMGR_BUSY.
 *
 * The life of a step: write keys and values, observe, attend. A slot holds at most one token for
 * each KV head: absent, live, or evicted by the policy and remembered as such until it is written.
 */
typedef struct kvmgr_slots kvmgr_slots;

/**
 * A place for sealed blocks: host memory, or whatever the engine implements. Shared: retain and
 * release, any thread.
 */
typedef struct kvmgr_store kvmgr_store;

/**
 * The result of every call that can fail: 0 or a negative number that never changes its meaning.
 * After a failure `kvmgr_last_error_message` says which argument, which value and which limit.
 */
typedef int32_t kvmgr_status;

/**
 * How important a log message is.
 */
typedef uint32_t kvmgr_log_level;

/**
 * Receives log messages.
 *
 * Called on the thread that caused the message, possibly on several at once. It must not call the
 * library back, throw or longjmp. `message` is valid during the call.
 */
typedef void (*kvmgr_log_fn)(void *user_data, kvmgr_log_level level, const char *message);

/**
 * Where memory is, in DLPack's numbering; 0 means CPU too.
 */
typedef uint32_t kvmgr_device_type;

/**
 * The engine's own store. Set struct_size to sizeof(kvmgr_store_ops).
 *
 * The functions may be called from several threads at once. They must not call the library back,
 * throw or longjmp; pointers are valid during the call. Every function but destroy is required.
 */
typedef struct {
  /**
   * sizeof(kvmgr_store_ops).
   */
  size_t struct_size;
  /**
   * Stores size bytes under a 32-byte key, replacing what was there. KVMGR_OUT_OF_MEMORY if full.
   */
  kvmgr_status (*put)(void *user_data, const uint8_t *key, const void *bytes, size_t size);
  /**
   * Fills out with the object, which has size bytes. KVMGR_NOT_FOUND if there is none.
   */
  kvmgr_status (*get)(void *user_data, const uint8_t *key, void *out, size_t size);
  /**
   * KVMGR_OK if the object exists, KVMGR_NOT_FOUND if not.
   */
  kvmgr_status (*contains)(void *user_data, const uint8_t *key);
  /**
   * Forgets the object; KVMGR_OK also if there is none.
   */
  kvmgr_status (*remove)(void *user_data, const uint8_t *key);
  /**
   * Called once when the last reference to the store is gone. May be NULL.
   */
  void (*destroy)(void *user_data);
} kvmgr_store_ops;

/**
 * What a store holds and has done. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(kvmgr_store_stats).
   */
  size_t struct_size;
  /**
   * Objects held. 0 for an engine's own store.
   */
  uint64_t objects;
  /**
   * Bytes held. 0 for an engine's own store.
   */
  uint64_t bytes;
  /**
   * Objects put since creation.
   */
  uint64_t puts;
  /**
   * Objects found since creation.
   */
  uint64_t hits;
  /**
   * Objects not found since creation.
   */
  uint64_t misses;
} kvmgr_store_stats;

/**
 * A side of the cache. Some quantizers group keys and values along different axes.
 */
typedef uint32_t kvmgr_side;

/**
 * When a policy acts.
 */
typedef uint32_t kvmgr_event;

/**
 * Which elements of a head RoPE pairs.
 */
typedef uint32_t kvmgr_rope_style;

/**
 * What a policy is told about one layer. Set struct_size to its sizeof. Lists that the policy
 * does not need (kvmgr_policy_needs) may be NULL.
 */
typedef struct {
  /**
   * sizeof(kvmgr_policy_input).
   */
  size_t struct_size;
  /**
   * Index of the layer.
   */
  uint32_t layer;
  /**
   * Layers of the model; 0 means layer + 1.
   */
  uint32_t num_layers;
  /**
   * Query heads, a multiple of num_kv_heads.
   */
  uint32_t num_q_heads;
  /**
   * Key/value heads.
   */
  uint32_t num_kv_heads;
  /**
   * Elements of a key and of a query.
   */
  uint32_t head_dim;
  /**
   * Cached tokens T of each KV head, at least 1.
   */
  uint32_t num_tokens;
  /**
   * Queries w of each query head; the last belongs to the last token.
   */
  uint32_t num_queries;
  /**
   * What happened.
   */
  kvmgr_event event;
  /**
   * [num_kv_heads, T, head_dim].
   */
  const float *keys;
  /**
   * [num_kv_heads, T, value_dim].
   */
  const float *values;
  /**
   * [num_q_heads, w, head_dim], oldest first.
   */
  const float *queries;
  /**
   * [num_kv_heads, T]: probability received, summed over queries and the group's heads.
   */
  const float *column_sums;
  /**
   * [T] original positions, ascending; NULL means 0 to T - 1.
   */
  const int32_t *positions;
  /**
   * [num_q_heads, head_dim]: mean of the queries before rotation, without the first 4 tokens.
   */
  const float *query_mean;
  /**
   * [num_q_heads, head_dim, head_dim]: their population covariance.
   */
  const float *query_covariance;
  /**
   * rope_dims / 2 frequencies in radians for each position, or NULL for powers of rope_base.
   */
  const float *rope_inv_freq;
  /**
   * How the model rotates queries and keys; needed with KVMGR_NEEDS_ROPE, unless only pos(...)
   * needs it.
   */
  kvmgr_rope_style rope_style;
  /**
   * Rotated elements of a head, even, at most head_dim - rope_first, which 0 means.
   */
  uint32_t rope_dims;
  /**
   * Base of the frequencies; 0 means 10000.
   */
  float rope_base;
  /**
   * Elements of a hidden state, at most 65536; needed with KVMGR_NEEDS_HIDDEN and
   * KVMGR_NEEDS_OUTPUT_PROJECTION, else 0 is fine.
   */
  uint32_t hidden_size;
  /**
   * [T, hidden_size]: the input of attention, after its norm.
   */
  const float *hidden;
  /**
   * [hidden_size, num_q_heads * value_dim]: row i makes element i of the layer's output.
   */
  const float *output_projection;
  /**
   * [num_q_heads, T]: the largest probability that each token received from tokens that replay it,
   * with KVMGR_NEEDS_REPLAY_HIDDEN over the length of their hidden states.
   */
  const float *replay_maxima;
  /**
   * The KV head that a score of the engine's own is asked about; else 0.
   */
  uint32_t kv_head;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * [num_kv_heads, T]: queries since the policy last ran that gave a token less than 1 / T, on the
   * mean over the group's heads.
   */
  const float *low_counts;
  /**
   * Elements of a value; 0 means head_dim.
   */
  uint32_t value_dim;
  /**
   * The first rotated element of a head.
   */
  uint32_t rope_first;
} kvmgr_policy_input;

/**
 * A score of the engine's own. Set struct_size to sizeof(kvmgr_score_ops).
 *
 * The functions may be called from several threads at once, for different sequences. They must not
 * call the library back, throw or longjmp; pointers are valid during the call.
 */
typedef struct {
  /**
   * sizeof(kvmgr_score_ops).
   */
  size_t struct_size;
  /**
   * KVMGR_NEEDS_ bits of what it reads: KEYS, VALUES, QUERY_WINDOW, COLUMN_SUM.
   */
  uint32_t needs;
  /**
   * Queries of each head that it reads, at most 4096; not 0 with KVMGR_NEEDS_QUERY_WINDOW.
   */
  uint32_t query_window;
  /**
   * KVMGR_SCORE_EACH_STEP or 0.
   */
  uint32_t flags;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * Scores the T tokens of one KV head: input->num_kv_heads is 1, input->kv_head says which it is,
   * and input->event is 0 always. Higher stays; NaN goes first. out_protected is all 0; what is
   * set to 1 stays whatever its score. Anything but KVMGR_OK fails the call that ran the policy.
   */
  kvmgr_status (*score)(void *user_data,
                        const kvmgr_policy_input *input,
                        float *out_scores,
                        uint8_t *out_protected);
  /**
   * Called once when the name is taken back and no policy uses the score any more. May be NULL.
   */
  void (*destroy)(void *user_data);
} kvmgr_score_ops;

/**
 * What the layers of a group keep.
 */
typedef uint32_t kvmgr_group_kind;

/**
 * A group of layers of a hybrid model. Every group has a block table of its own; all draw from the
 * same blocks.
 */
typedef struct {
  /**
   * What it keeps.
   */
  kvmgr_group_kind kind;
  /**
   * Tokens of a window or blocks between states, at least 1; 0 for the other kinds.
   */
  uint32_t value;
} kvmgr_group;

/**
 * How prefixes are named.
 */
typedef uint32_t kvmgr_hash;

/**
 * Settings of a pool. Set struct_size to its sizeof; every other zero means the default.
 */
typedef struct {
  /**
   * sizeof(kvmgr_pool_config).
   */
  size_t struct_size;
  /**
   * Blocks, 1 to 2^31.
   */
  uint64_t num_blocks;
  /**
   * Tokens of a block, 1 to 1024; 0 means 16.
   */
  uint32_t block_size;
  /**
   * KVMGR_POOL_PREFIX, _DEDUP, _PARTIAL, _LOG, _RECYCLED or 0.
   */
  uint32_t flags;
  /**
   * The evictor's spec; NULL means "lru".
   */
  const char *evictor;
  /**
   * The operator's secret that separates pools' prefixes.
   */
  uint64_t hash_salt;
  /**
   * Blocks that admission leaves available for sequences that run.
   */
  uint64_t watermark;
  /**
   * What else distinguishes prefixes: model, layout, number format. NULL means "".
   */
  const char *scope;
  /**
   * With KVMGR_HASH_VLLM the text of PYTHONHASHSEED, which names the root; NULL means "0".
   */
  const char *hash_seed;
  /**
   * Groups of a hybrid model; NULL means one full group.
   */
  const kvmgr_group *groups;
  /**
   * How many, 0 to 16.
   */
  uint32_t num_groups;
  /**
   * KVMGR_HASH_NATIVE or KVMGR_HASH_VLLM.
   */
  kvmgr_hash hash;
} kvmgr_pool_config;

/**
 * What a pool holds now and what it has done since its creation. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(kvmgr_pool_stats).
   */
  size_t struct_size;
  /**
   * Blocks of the pool.
   */
  uint64_t num_blocks;
  /**
   * Blocks nobody refers to.
   */
  uint64_t free_blocks;
  /**
   * Blocks that sequences and leases refer to.
   */
  uint64_t used_blocks;
  /**
   * Blocks that only the prefix index refers to; reclaimed when needed.
   */
  uint64_t idle_blocks;
  /**
   * Entries of the prefix index.
   */
  uint64_t prefix_entries;
  /**
   * Tokens of admitted prompts.
   */
  uint64_t prefix_query_tokens;
  /**
   * Tokens of them that were cached.
   */
  uint64_t prefix_hit_tokens;
  /**
   * Entries reclaimed.
   */
  uint64_t evictions;
  /**
   * Live sequences, parked ones included.
   */
  uint64_t num_sequences;
  /**
   * Leases that hold something.
   */
  uint64_t num_leases;
  /**
   * Bytes of bookkeeping for the blocks.
   */
  uint64_t metadata_bytes;
  /**
   * Sequences admitted.
   */
  uint64_t admissions;
  /**
   * Cached tokens that were copied from a part of a block.
   */
  uint64_t prefix_copied_tokens;
  /**
   * Tokens committed.
   */
  uint64_t committed_tokens;
  /**
   * Sequences forked.
   */
  uint64_t forks;
  /**
   * Sequences parked.
   */
  uint64_t preemptions;
  /**
   * Copies handed to the engine.
   */
  uint64_t copies;
  /**
   * Leases whose deadline passed.
   */
  uint64_t leases_expired;
  /**
   * Matches that ended at tokens never seen.
   */
  uint64_t misses_unknown;
  /**
   * Matches that ended at an entry that has been reclaimed.
   */
  uint64_t misses_evicted;
  /**
   * Matches that a window group ended.
   */
  uint64_t misses_window;
  /**
   * Matches that a recurrent group ended.
   */
  uint64_t misses_checkpoint;
} kvmgr_pool_stats;

/**
 * What an extra key is.
 */
typedef uint32_t kvmgr_key_kind;

/**
 * What distinguishes equal tokens of a prompt: the hash of the image behind placeholder tokens. It
 * becomes part of the hash of every block that the tokens touch, and events tell it. With
 * KVMGR_HASH_VLLM items and texts are UTF-8.
 */
typedef struct {
  /**
   * First token.
   */
  uint64_t start;
  /**
   * Behind the last token.
   */
  uint64_t end;
  /**
   * The key.
   */
  const uint8_t *key;
  /**
   * Bytes of the key.
   */
  size_t key_size;
  /**
   * KVMGR_KEY_ITEM, _TEXT or _BYTES.
   */
  kvmgr_key_kind kind;
  /**
   * Must be 0.
   */
  uint32_t reserved;
} kvmgr_extra_key;

/**
 * A prompt that wants to become a sequence. Zero the struct; every zero but tokens is a default.
 */
typedef struct {
  /**
   * The prompt, at least one token.
   */
  const int32_t *tokens;
  /**
   * How many.
   */
  size_t num_tokens;
  /**
   * NULL, or 32 bytes for each full block of the prompt, in place of hashing here. The caller is
   * then the one who keeps tenants apart.
   */
  const uint8_t *hashes;
  /**
   * 0, or the full blocks of the prompt.
   */
  size_t num_hashes;
  /**
   * The operator's secret for this tenant: prompts with different salts share nothing and learn
   * nothing of one another. NULL for none.
   */
  const uint8_t *salt;
  /**
   * Bytes of the salt.
   */
  size_t salt_size;
  /**
   * NULL, or keys of parts of the prompt.
   */
  const kvmgr_extra_key *extra_keys;
  /**
   * How many.
   */
  size_t num_extra_keys;
  /**
   * The name of the adapter (LoRA) that computes the sequence, which shares nothing with others.
   * Events tell it. NULL or "" for none.
   */
  const char *adapter;
  /**
   * Microseconds after the sequence ends until its entries are reclaimed before all others; 0
   * for never.
   */
  uint64_t ttl;
  /**
   * The session that the sequence is a state of; 0 for none. When it ends, entries of the state
   * before that it does not share are reclaimed before all others.
   */
  uint64_t session;
  /**
   * Priority of its entries, 1 to 100, with an evictor that knows priorities; 0 means 35.
   */
  uint32_t priority;
  /**
   * Must be 0.
   */
  uint32_t reserved;
} kvmgr_pool_request;

/**
 * Names a sequence of a pool. Never 0; a number whose sequence has ended, or of another pool, is
 * an error wherever it is used.
 */
typedef uint64_t kvmgr_pool_sequence;

/**
 * Why a match ended.
 */
typedef uint32_t kvmgr_miss;

/**
 * A prompt that became a sequence.
 */
typedef struct {
  /**
   * Its name.
   */
  kvmgr_pool_sequence sequence;
  /**
   * Tokens that were cached; they are committed.
   */
  uint64_t num_cached;
  /**
   * Of these, tokens in a block that the engine copies: kvmgr_pool_take_copies.
   */
  uint64_t num_copied;
  /**
   * The first token that was not cached, before copies.
   */
  uint64_t miss_token;
  /**
   * Why not.
   */
  kvmgr_miss miss;
  /**
   * The group that ended the match.
   */
  uint32_t miss_group;
} kvmgr_pool_admission;

/**
 * Where the bytes of a block of a parked sequence belong.
 */
typedef struct {
  /**
   * Place in the tables: block of tokens * num_groups + group.
   */
  uint32_t place;
  /**
   * The block of the engine's memory.
   */
  uint32_t block;
} kvmgr_placement;

/**
 * A copy that an engine with its own tensors makes before it writes: a fork's open block.
 */
typedef struct {
  /**
   * Block to copy from.
   */
  uint32_t source;
  /**
   * Block to copy to.
   */
  uint32_t target;
} kvmgr_block_copy;

/**
 * Receives a batch of events: msgpack as vLLM sends it.
 *
 * Called within the call that caused the events, in the order of number, which counts from 0
 * without gaps. It must not call a pool, throw or longjmp. `data` is valid during the call.
 */
typedef void (*kvmgr_events_fn)(void *user_data, uint64_t number, const void *data, size_t size);

/**
 * A request that waits.
 */
typedef struct {
  /**
   * Blocks of its prompt that are cached now.
   */
  uint32_t cached_blocks;
  /**
   * Blocks that it needs besides.
   */
  uint32_t needed_blocks;
  /**
   * Whose it is.
   */
  uint32_t tenant;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * Microseconds that it has waited.
   */
  uint64_t waited;
} kvmgr_waiting;

/**
 * A sequence that runs.
 */
typedef struct {
  /**
   * Blocks that become available if it goes: those that nobody shares.
   */
  uint32_t own_blocks;
  /**
   * Tokens to compute again if it comes back without its blocks.
   */
  uint32_t tokens;
  /**
   * Sequences of lower priority go first.
   */
  uint32_t priority;
  /**
   * Must be 0.
   */
  uint32_t reserved;
  /**
   * When it was admitted; among equals the youngest goes first.
   */
  uint64_t admitted;
} kvmgr_running;

/**
 * What one block table of a sequence covers.
 */
typedef uint32_t kvmgr_lane_width;

/**
 * The element type of a tensor.
 */
typedef uint32_t kvmgr_dtype;

/**
 * Settings of a cache. Set struct_size to its sizeof; every other zero means the default.
 */
typedef struct {
  /**
   * sizeof(kvmgr_cache_config).
   */
  size_t struct_size;
  /**
   * Layers with keys and values, 1 to 4096. In a hybrid model only these: they are numbered 0 to
   * num_layers - 1 in all calls but kvmgr_sequence_recurrent_state, budgets are divided among them, and
   * skip_layers of a spec counts them.
   */
  uint32_t num_layers;
  /**
   * Query heads of a layer, a multiple of num_kv_heads.
   */
  uint32_t num_q_heads;
  /**
   * Key/value heads of a layer, 1 to 4096.
   */
  uint32_t num_kv_heads;
  /**
   * Elements of a key, and of a value unless value_dim says otherwise, 1 to 1024.
   */
  uint32_t head_dim;
  /**
   * Tokens of a block, 1 to 1024; 0 means 32.
   */
  uint32_t block_size;
  /**
   * What one block table covers; 0 means the coarsest that the spec allows.
   */
  kvmgr_lane_width lane_width;
  /**
   * Element type of blocks that still fill; 0 means KVMGR_DTYPE_F16.
   */
  kvmgr_dtype dtype;
  /**
   * Workers of the library for calls with num_workers 0; 0 means one for each core.
   */
  uint32_t num_threads;
  /**
   * Blocks, over all lanes of all sequences; 1 to 2^31.
   */
  uint64_t num_blocks;
  /**
   * Bytes of block memory; 0 means num_blocks unquantized blocks. Addresses are reserved at
   * once, memory is taken as blocks are used.
   */
  uint64_t memory_limit;
  /**
   * The pipeline of new sequences; NULL means "full". Copied.
   */
  const char *spec;
  /**
   * The evictor's spec; NULL means "lru". Copied.
   */
  const char *evictor;
  /**
   * Where reclaimed prefixes go; may be NULL. The cache keeps a reference.
   */
  kvmgr_store *store;
  /**
   * The operator's secret that separates tenants' prefixes.
   */
  uint64_t hash_salt;
  /**
   * KVMGR_CACHE_PREFIX, KVMGR_CACHE_VALUES_IN_KEYS, both or 0.
   */
  uint32_t flags;
  /**
   * How the model rotates queries and keys; needed by specs with pos(cache_relative).
   */
  kvmgr_rope_style rope_style;
  /**
   * Rotated elements of a head, even; 0 means head_dim - rope_first.
   */
  uint32_t rope_dims;
  /**
   * Base of the frequencies; 0 means 10000.
   */
  float rope_base;
  /**
   * rope_dims / 2 frequencies in radians for each position, or NULL for powers of rope_base.
   * Copied.
   */
  const float *rope_inv_freq;
  /**
   * Where the blocks are; 0 means KVMGR_DEVICE_CPU. On KVMGR_DEVICE_CUDA: head_dim 64, 128 or
   * 256, block_size 16, 32 or 64, up to 16 query heads for each KV head, dtype f16 or bf16, the
   * spec "full" or quant of int8, int4, fp8(e4m3) or kivi with group at least 64 and head_dim, for
   * keys and values alike, or int8 for keys and int4 for values, with block_size 64, and skip_layers,
   * first and residual. With quest the first sequence takes 4 * head_dim bytes more from the driver for
   * each layer and KV head of each of num_blocks blocks.
   * A store has the bytes of the host, so one may serve caches on either.
   */
  kvmgr_device_type device_type;
  /**
   * Which CUDA device. The cache works in the calling thread's current context if that is one of
   * this device, else in the device's primary context; either must outlive the cache. No call
   * changes which context is current.
   */
  int32_t device_id;
  /**
   * The engine's own device memory for the blocks, memory_limit bytes, aligned to 256; or NULL:
   * the cache takes memory_limit bytes from the driver. It must stay until the cache is gone and
   * the device is done with it. CUDA only.
   */
  void *memory;
  /**
   * Elements of a value and of an output, 1 to 1024, with KVMGR_CACHE_VALUES_IN_KEYS at most head_dim;
   * 0 means head_dim.
   */
  uint32_t value_dim;
  /**
   * The first rotated element of a head: the latent of MLA comes before those that are rotated.
   */
  uint32_t rope_first;
  /**
   * Layers with a recurrent state (Mamba, RWKV, linear attention), 0 to 4096; 0 means none. They are
   * numbered 0 to recurrent_layers - 1, apart from those with keys and values. See
   * kvmgr_sequence_recurrent_state.
   */
  uint32_t recurrent_layers;
  /**
   * Snapshots of a sequence at most, 1 to 1024; 0 means 4. One more takes the place of the oldest.
   * With one after each draft, as many as drafts and one.
   */
  uint32_t recurrent_snapshots;
  /**
   * Bytes of the state of a recurrent layer, 1 to less than 4 GiB for all layers together. What a layer
   * keeps apart, as the convolution and the scan of Mamba, are parts of it.
   */
  uint64_t recurrent_bytes;
  /**
   * States of all recurrent layers that there can be, 1 to 2^20: one for each sequence, one for each
   * snapshot, one for each prefix that keeps one. Sequences times (1 + recurrent_snapshots) never run
   * out. They have memory of their own beside memory_limit, on the same device, whole pages each; on
   * the host it is taken as they are used. Required with recurrent_layers.
   */
  uint64_t num_states;
} kvmgr_cache_config;

/**
 * What a cache holds and has done. Set struct_size before the call. Bytes are bytes of blocks as
 * they are allocated.
 */
typedef struct {
  /**
   * sizeof(kvmgr_cache_stats).
   */
  size_t struct_size;
  /**
   * Blocks of the cache.
   */
  uint64_t num_blocks;
  /**
   * Blocks nobody refers to.
   */
  uint64_t free_blocks;
  /**
   * Blocks that sequences refer to.
   */
  uint64_t used_blocks;
  /**
   * Blocks that only the prefix index refers to; reclaimed when needed.
   */
  uint64_t idle_blocks;
  /**
   * Bytes of used blocks.
   */
  uint64_t bytes_used;
  /**
   * Bytes of idle blocks.
   */
  uint64_t bytes_idle;
  /**
   * Bytes taken from the system; pages that were never written cost nothing yet.
   */
  uint64_t bytes_committed;
  /**
   * Largest bytes_used since creation or kvmgr_cache_reset_peak.
   */
  uint64_t bytes_peak;
  /**
   * Prefixes in the index.
   */
  uint64_t prefix_entries;
  /**
   * Tokens asked for in kvmgr_sequence_match_prefix since creation.
   */
  uint64_t prefix_query_tokens;
  /**
   * Tokens found there since creation.
   */
  uint64_t prefix_hit_tokens;
  /**
   * Prefixes reclaimed since creation.
   */
  uint64_t evictions;
  /**
   * Prefixes offloaded to the store since creation.
   */
  uint64_t store_puts;
  /**
   * Prefixes fetched from the store since creation.
   */
  uint64_t store_hits;
  /**
   * Failures of the store since creation; each counted as a miss.
   */
  uint64_t store_failures;
  /**
   * Tokens committed since creation.
   */
  uint64_t tokens_appended;
  /**
   * (layer, KV head) rows that policies evicted since creation.
   */
  uint64_t rows_evicted;
  /**
   * Live sequences.
   */
  uint64_t num_sequences;
  /**
   * States of recurrent layers that there can be. Those of all layers of a sequence are one, and the
   * numbers of blocks and their bytes above do not count them.
   */
  uint64_t num_states;
  /**
   * States nobody refers to.
   */
  uint64_t free_states;
  /**
   * States of sequences, snapshots included.
   */
  uint64_t used_states;
  /**
   * States that only the prefix index refers to; dropped when needed.
   */
  uint64_t idle_states;
  /**
   * Bytes of used states.
   */
  uint64_t state_bytes_used;
  /**
   * Bytes of idle states.
   */
  uint64_t state_bytes_idle;
  /**
   * Bytes of states taken from the system: used, idle, and a few free ones.
   */
  uint64_t state_bytes_committed;
  /**
   * Largest state_bytes_used since creation or kvmgr_cache_reset_peak.
   */
  uint64_t state_bytes_peak;
} kvmgr_cache_stats;

/**
 * A strided view of the caller's memory. The library never keeps it beyond the call.
 *
 * Shapes: Q and O are [tokens, q_heads, head_dim], K and V are [tokens, kv_heads, head_dim], LSE
 * is [tokens, q_heads]. The innermost dimension is contiguous.
 */
typedef struct {
  /**
   * First element, aligned for `dtype`.
   */
  void *data;
  /**
   * Type of the elements.
   */
  kvmgr_dtype dtype;
  /**
   * Dimensions in use: 2 or 3.
   */
  uint32_t ndim;
  /**
   * Elements of each dimension.
   */
  int64_t shape[4];
  /**
   * Distance between neighbours in elements; all zero means contiguous.
   */
  int64_t strides[4];
  /**
   * Where the memory is; 0 means CPU.
   */
  kvmgr_device_type device_type;
  /**
   * Which device.
   */
  int32_t device_id;
} kvmgr_tensor;

/**
 * What a sequence holds. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(kvmgr_sequence_stats).
   */
  size_t struct_size;
  /**
   * Committed tokens, evicted ones included.
   */
  uint64_t num_tokens;
  /**
   * Reserved tokens.
   */
  uint64_t num_reserved;
  /**
   * Rows kept, summed over layers and KV heads.
   */
  uint64_t rows_kept;
  /**
   * Rows evicted, summed over layers and KV heads.
   */
  uint64_t rows_evicted;
  /**
   * Bytes of the blocks referred to, shared ones included.
   */
  uint64_t bytes;
  /**
   * Blocks referred to, shared ones included.
   */
  uint64_t num_blocks;
  /**
   * Bytes of what the spec's selector knows of the blocks; not part of `bytes`. 0 on a CUDA device, where
   * that lies beside the blocks and is everybody's.
   */
  uint64_t selector_bytes;
  /**
   * Bytes of the states of recurrent layers and of snapshots, shared ones included; not part of `bytes`.
   */
  uint64_t state_bytes;
  /**
   * Bytes of the subspaces that were fitted to the sequence's prompt (k_rank, v_rank), which forks share;
   * not part of `bytes`.
   */
  uint64_t basis_bytes;
} kvmgr_sequence_stats;

/**
 * What a plan shares between sequences. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(kvmgr_attention_stats).
   */
  size_t struct_size;
  /**
   * Groups of sequences that start with the same blocks, which are read once for all of them.
   */
  uint64_t shared_groups;
  /**
   * Sequences in groups.
   */
  uint64_t shared_sequences;
  /**
   * Rows that a group shares, of its longest lane, summed over groups.
   */
  uint64_t shared_rows;
  /**
   * Tasks over shared rows that workers have done since the plan was made. 0 if the runs could not
   * use them: with a sliding window, ALiBi, chosen blocks or KVMGR_ATTENTION_NO_CASCADE.
   */
  uint64_t shared_tasks_run;
} kvmgr_attention_stats;

/**
 * What a layer does to its logits. Set struct_size to its sizeof; zeros, or NULL instead of the
 * struct, mean plain softmax(q . k / sqrt(head_dim)).
 */
typedef struct {
  /**
   * sizeof(kvmgr_attention_options).
   */
  size_t struct_size;
  /**
   * Factor of q . k; 0 means 1 / sqrt(head_dim).
   */
  float scale;
  /**
   * Logits become softcap * tanh(logit / softcap); 0 means off.
   */
  float softcap;
  /**
   * Keys at this distance or further are invisible; 0 means off.
   */
  uint32_t sliding_window;
  /**
   * 0 or KVMGR_ATTENTION_NO_CASCADE.
   */
  uint32_t flags;
  /**
   * num_q_heads learned logits, an extra term of the denominator and of the LSE; or NULL. In
   * device memory for a cache on a CUDA device.
   */
  const float *sinks;
  /**
   * num_q_heads slopes: logits lose slope * distance; or NULL, which it must be on CUDA.
   */
  const float *alibi_slopes;
} kvmgr_attention_options;

/**
 * What a layer does to its logits under a mask. Set struct_size to its sizeof; zeros, or NULL
 * instead of the struct, mean plain softmax(q . k / sqrt(key_dim) + mask).
 */
typedef struct {
  /**
   * sizeof(kvmgr_mask_options).
   */
  size_t struct_size;
  /**
   * Factor of q . k; 0 means 1 / sqrt(key_dim).
   */
  float scale;
  /**
   * Logits become softcap * tanh(logit / softcap); 0 means off.
   */
  float softcap;
  /**
   * num_q_heads learned logits, an extra term of the denominator; or NULL.
   */
  const float *sinks;
  /**
   * num_q_heads factors of the mask; or NULL for 1.
   */
  const float *mask_slopes;
  /**
   * Where the workers of the call meet; or NULL, then workers share heads but no rows.
   */
  const kvmgr_meeting *meeting;
} kvmgr_mask_options;

/**
 * Settings of the slots of a layer. Set struct_size to its sizeof; zeros mean the default.
 */
typedef struct {
  /**
   * sizeof(kvmgr_slots_config).
   */
  size_t struct_size;
  /**
   * Index of the layer; policies may treat layers differently.
   */
  uint32_t layer;
  /**
   * Layers of the model; 0 means layer + 1.
   */
  uint32_t num_layers;
  /**
   * Query heads, a multiple of num_kv_heads.
   */
  uint32_t num_q_heads;
  /**
   * Key/value heads, 1 to 4096.
   */
  uint32_t num_kv_heads;
  /**
   * Elements of a key, 1 to 1024.
   */
  uint32_t key_dim;
  /**
   * Elements of a value; 0 means key_dim.
   */
  uint32_t value_dim;
  /**
   * Slots of a stream, at least 1. Addresses are reserved, memory is taken as slots are written.
   */
  uint32_t num_slots;
  /**
   * Groups of slots that never see each other; 0 means 1. Slot s of stream i is number
   * i * num_slots + s.
   */
  uint32_t num_streams;
  /**
   * Rows of a block, at most 64; 0 means 64.
   */
  uint32_t block_size;
  /**
   * KVMGR_SLOTS_PIECES or 0.
   */
  uint32_t flags;
  /**
   * The pipeline; NULL means "full". Copied. Stages may need keys, values and the last queries;
   * column sums and rotations are refused.
   */
  const char *spec;
} kvmgr_slots_config;

/**
 * What the slots of a layer hold and have done. Set struct_size before the call.
 */
typedef struct {
  /**
   * sizeof(kvmgr_slots_stats).
   */
  size_t struct_size;
  /**
   * Bytes of blocks in use.
   */
  uint64_t bytes_used;
  /**
   * Largest bytes_used since creation.
   */
  uint64_t bytes_peak;
  /**
   * Live (slot, KV head) pairs.
   */
  uint64_t rows_live;
  /**
   * (slot, KV head) pairs evicted since creation.
   */
  uint64_t rows_evicted;
  /**
   * (slot, side) pairs written since creation.
   */
  uint64_t rows_written;
} kvmgr_slots_stats;

/**
 * Success.
 */
#define KVMGR_OK 0

/**
 * An argument is outside its documented range.
 */
#define KVMGR_INVALID_ARGUMENT -1

/**
 * A handle is NULL, of another type, or already released (as far as that can be told).
 */
#define KVMGR_INVALID_HANDLE -2

/**
 * The call is valid, but not in the current state of the object.
 */
#define KVMGR_INVALID_STATE -3

/**
 * An exclusive handle is in use by another thread.
 */
#define KVMGR_BUSY -4

/**
 * The named thing does not exist.
 */
#define KVMGR_NOT_FOUND -5

/**
 * No free block is left: a normal answer, preempt a sequence and retry.
 */
#define KVMGR_OUT_OF_BLOCKS -10

/**
 * A memory limit is reached or the system refused memory.
 */
#define KVMGR_OUT_OF_MEMORY -11

/**
 * This build, device or pipeline cannot do what was asked.
 */
#define KVMGR_UNSUPPORTED -20

/**
 * No device of the wanted type is usable on this machine; the message says why.
 */
#define KVMGR_NO_DEVICE -21

/**
 * A device reported an error.
 */
#define KVMGR_DEVICE_ERROR -30

/**
 * A store failed.
 */
#define KVMGR_STORE_ERROR -31

/**
 * Bytes read back are not the bytes that were written.
 */
#define KVMGR_CORRUPT -32

/**
 * A bug in the library. The handle that was in use answers this from now on.
 */
#define KVMGR_INTERNAL -99

/**
 * IEEE 754 single precision.
 */
#define KVMGR_DTYPE_F32 1

/**
 * IEEE 754 half precision.
 */
#define KVMGR_DTYPE_F16 2

/**
 * bfloat16.
 */
#define KVMGR_DTYPE_BF16 3

/**
 * The coarsest width that the spec of the cache allows.
 */
#define KVMGR_LANE_AUTO 0

/**
 * One table for all layers and heads: the plain paged layout.
 */
#define KVMGR_LANE_SEQUENCE 1

/**
 * One table for each layer.
 */
#define KVMGR_LANE_LAYER 2

/**
 * One table for each layer and KV head: heads keep different tokens and really free the others.
 */
#define KVMGR_LANE_HEAD 3

/**
 * The engine does not tell; specs that rotate keys are refused.
 */
#define KVMGR_ROPE_NONE 0

/**
 * Pairs (i, i + dims/2): Hugging Face rotate_half, ggml NEOX.
 */
#define KVMGR_ROPE_HALF 1

/**
 * Pairs (2i, 2i + 1): RoFormer, ggml NORM.
 */
#define KVMGR_ROPE_INTERLEAVED 2

/**
 * Keys.
 */
#define KVMGR_SIDE_KEY 1

/**
 * Values.
 */
#define KVMGR_SIDE_VALUE 2

/**
 * Host memory.
 */
#define KVMGR_DEVICE_CPU 1

/**
 * CUDA device memory.
 */
#define KVMGR_DEVICE_CUDA 2

/**
 * No messages.
 */
#define KVMGR_LOG_OFF 0

/**
 * Something failed.
 */
#define KVMGR_LOG_ERROR 1

/**
 * Something works, but not as one would expect.
 */
#define KVMGR_LOG_WARN 2

/**
 * Rare events of interest.
 */
#define KVMGR_LOG_INFO 3

/**
 * For developers.
 */
#define KVMGR_LOG_DEBUG 4

/**
 * The prompt has been read.
 */
#define KVMGR_EVENT_PREFILL_END 0

/**
 * A generated token was committed.
 */
#define KVMGR_EVENT_STEP 1

/**
 * SHA-256 of tokens and the hash before them; the fastest.
 */
#define KVMGR_HASH_NATIVE 0

/**
 * vLLM's sha256_cbor, so that its routers compute the same.
 */
#define KVMGR_HASH_VLLM 1

/**
 * Keys and values of every token.
 */
#define KVMGR_GROUP_FULL 0

/**
 * One latent row of every token (MLA).
 */
#define KVMGR_GROUP_LATENT 1

/**
 * Keys and values of the last `value` tokens; older blocks go back to the pool.
 */
#define KVMGR_GROUP_WINDOW 2

/**
 * A state that every token changes, kept at the end of every `value`-th block.
 */
#define KVMGR_GROUP_RECURRENT 3

/**
 * It did not: everything but the last token, which is always computed, was cached.
 */
#define KVMGR_MISS_NONE 0

/**
 * Tokens that were never seen, as far as is remembered.
 */
#define KVMGR_MISS_UNKNOWN 1

/**
 * An entry that has been reclaimed.
 */
#define KVMGR_MISS_EVICTED 2

/**
 * Blocks of a window group are missing.
 */
#define KVMGR_MISS_WINDOW 3

/**
 * A recurrent group has no state at a usable place.
 */
#define KVMGR_MISS_CHECKPOINT 4

/**
 * The identifier of an image or another input behind placeholder tokens. Its distance from the
 * start of the block is hashed with it, which tells its parts apart.
 */
#define KVMGR_KEY_ITEM 0

/**
 * A text.
 */
#define KVMGR_KEY_TEXT 1

/**
 * Bytes: the hash of prompt embeddings.
 */
#define KVMGR_KEY_BYTES 2

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the loaded library: major << 16 | minor << 8 | patch.
 */
uint32_t kvmgr_version(void);

/**
 * The version of the loaded library as text, such as "0.1.0". Static.
 */
const char *kvmgr_version_string(void);

/**
 * Whether the loaded library can do something: "avx2" or "avx512" (kernels for this CPU), "cuda" (it
 * has kernels for CUDA devices; kvmgr_device_count tells whether this machine has a device). Unknown
 * names are false. The exported symbols never depend on features.
 *
 * @param name a NUL-terminated string
 */
bool kvmgr_has_feature(const char *name);

/**
 * The instruction set of the CPU kernels in use: "scalar", "avx2" or "avx512". Static. The
 * environment variable KVMGR_CPU forces one; a value that cannot be honoured is logged by
 * kvmgr_cache_create and ignored.
 */
const char *kvmgr_cpu_level(void);

/**
 * The name of a status, such as "OUT_OF_BLOCKS"; "UNKNOWN" for a number that is none. Static.
 */
const char *kvmgr_status_name(kvmgr_status status);

/**
 * What went wrong in the last failing call of this thread: which argument, which value, which
 * limit. Empty before the first failure. The pointer is the same for the life of the thread; the
 * text is replaced by the next failure, never freed.
 */
const char *kvmgr_last_error_message(void);

/**
 * Sets the log hook of the process. The library is silent without one.
 *
 * When the call returns, the previous hook is not running any more and its user_data may go.
 *
 * @param user_data passed to every call of `log`; must stay valid until the hook is replaced
 * @param max_level least important level to report, KVMGR_LOG_OFF to KVMGR_LOG_DEBUG
 * @param log the hook, or NULL for silence
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_set_log(void *user_data,
                           kvmgr_log_level max_level,
                           kvmgr_log_fn log);

/**
 * How many devices of a type this machine offers: 1 for KVMGR_DEVICE_CPU, for KVMGR_DEVICE_CUDA
 * what the driver counts. When the answer is 0, kvmgr_last_error_message says why: no driver
 * library, no visible device, a driver that is too old. Neither the build nor the library needs
 * CUDA; the driver is looked for at each call, so this is not for a hot path. Any thread; the
 * caller's current CUDA context stays as it is.
 */
uint32_t kvmgr_device_count(kvmgr_device_type device_type);

/**
 * Kinds of stores that kvmgr_store_create knows.
 */
size_t kvmgr_store_count(void);

/**
 * The name of kind index; NULL past the end. Static.
 */
const char *kvmgr_store_name(size_t index);

/**
 * A line about kind index: purpose and parameters; NULL past the end. Static.
 */
const char *kvmgr_store_help(size_t index);

/**
 * Makes the store that spec names, such as "host(capacity=64mi)".
 *
 * @param spec a NUL-terminated string
 * @param out_store receives a handle with one reference; NULL on failure
 */
KVMGR_NODISCARD kvmgr_status kvmgr_store_create(const char *spec, kvmgr_store **out_store);

/**
 * Makes a store out of the engine's functions. On failure destroy is not called.
 *
 * @param user_data passed to every function
 * @param ops copied; need not outlive the call
 * @param out_store receives a handle with one reference; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_store_create_custom(void *user_data,
                                       const kvmgr_store_ops *ops,
                                       kvmgr_store **out_store);

/**
 * Adds a reference; answers the same handle, or NULL if it is not a live store.
 */
kvmgr_store *kvmgr_store_retain(kvmgr_store *store);

/**
 * Drops a reference. NULL is fine. Caches and preempted sequences keep their own.
 */
void kvmgr_store_release(kvmgr_store *store);

/**
 * Stores size bytes under a key of KVMGR_STORE_KEY_SIZE bytes, replacing what was there.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_store_put(kvmgr_store *store,
                             const uint8_t *key,
                             const void *bytes,
                             size_t size);

/**
 * Fills out, which has exactly the size of the object. KVMGR_NOT_FOUND if there is none.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_store_get(kvmgr_store *store,
                             const uint8_t *key,
                             void *out,
                             size_t size);

/**
 * KVMGR_OK if the object exists, KVMGR_NOT_FOUND if not.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_store_contains(kvmgr_store *store, const uint8_t *key);

/**
 * Forgets an object; KVMGR_OK also if there is none.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_store_remove(kvmgr_store *store, const uint8_t *key);

/**
 * Numbers about a store.
 *
 * @param out_stats its struct_size must be set; receives the numbers
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_store_get_stats(const kvmgr_store *store,
                                   kvmgr_store_stats *out_stats);

/**
 * Kinds of quantizers.
 */
size_t kvmgr_quantizer_count(void);

/**
 * The name of kind index; NULL past the end. Static.
 */
const char *kvmgr_quantizer_name(size_t index);

/**
 * A line about kind index: purpose, parameters, paper; NULL past the end. Static.
 */
const char *kvmgr_quantizer_help(size_t index);

/**
 * Makes the quantizer that spec names, such as "q8_0", "had+q4_0" or "kivi(bits=2)".
 *
 * @param spec a NUL-terminated string
 * @param side which side it will store; some formats group keys and values differently
 * @param out_quantizer receives a handle with one reference; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_quantizer_create(const char *spec,
                                    kvmgr_side side,
                                    kvmgr_quantizer **out_quantizer);

/**
 * Adds a reference; answers the same handle, or NULL if it is not a live quantizer.
 */
kvmgr_quantizer *kvmgr_quantizer_retain(kvmgr_quantizer *quantizer);

/**
 * Drops a reference. NULL is fine.
 */
void kvmgr_quantizer_release(kvmgr_quantizer *quantizer);

/**
 * Bytes of num_tokens encoded rows of dim elements.
 *
 * @param num_tokens 1 to 1024
 * @param dim 1 to 1024; formats with groups need a multiple of their group
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_quantizer_bytes(const kvmgr_quantizer *quantizer,
                                   uint32_t num_tokens,
                                   uint32_t dim,
                                   size_t *out_bytes);

/**
 * Encodes rows [num_tokens, dim] into out, which has exactly kvmgr_quantizer_bytes bytes.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_quantizer_encode(const kvmgr_quantizer *quantizer,
                                    const float *rows,
                                    uint32_t num_tokens,
                                    uint32_t dim,
                                    void *out,
                                    size_t out_size);

/**
 * Decodes bytes, made by kvmgr_quantizer_encode with the same shape, into out_rows
 * [num_tokens, dim].
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_quantizer_decode(const kvmgr_quantizer *quantizer,
                                    const void *bytes,
                                    size_t size,
                                    uint32_t num_tokens,
                                    uint32_t dim,
                                    float *out_rows);

/**
 * out_scores[i, t] = queries[i] . row[t], without decoding to memory.
 *
 * @param queries [num_queries, dim]
 * @param out_scores [num_queries, num_tokens]
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_quantizer_dot(const kvmgr_quantizer *quantizer,
                                 const void *bytes,
                                 size_t size,
                                 uint32_t num_tokens,
                                 uint32_t dim,
                                 const float *queries,
                                 uint32_t num_queries,
                                 float *out_scores);

/**
 * outputs[i] += sum over t of weights[i, t] * row[t], without decoding to memory.
 *
 * @param weights [num_queries, num_tokens]
 * @param outputs [num_queries, dim], added to
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_quantizer_axpy(const kvmgr_quantizer *quantizer,
                                  const void *bytes,
                                  size_t size,
                                  uint32_t num_tokens,
                                  uint32_t dim,
                                  const float *weights,
                                  uint32_t num_queries,
                                  float *outputs);

/**
 * Stages that a spec can name.
 */
size_t kvmgr_policy_stage_count(void);

/**
 * The name of stage index, in the order in which a spec writes them; NULL past the end. Static.
 */
const char *kvmgr_policy_stage_name(size_t index);

/**
 * A line about stage index: class, purpose, parameters, paper; NULL past the end. Static.
 */
const char *kvmgr_policy_stage_help(size_t index);

/**
 * Parses a policy, such as "snapkv(w=64) | adakv(0.2) | keep(0.25)". Errors name the column.
 *
 * @param spec a NUL-terminated string
 * @param out_policy receives a handle with one reference; NULL on failure
 */
KVMGR_NODISCARD kvmgr_status kvmgr_policy_create(const char *spec, kvmgr_policy **out_policy);

/**
 * Adds a reference; answers the same handle, or NULL if it is not a live policy.
 */
kvmgr_policy *kvmgr_policy_retain(kvmgr_policy *policy);

/**
 * Drops a reference. NULL is fine. Sequences keep their policy alive.
 */
void kvmgr_policy_release(kvmgr_policy *policy);

/**
 * What the engine has to hand over: KVMGR_NEEDS_ bits, and how many queries of each head.
 * kvmgr_attention_run observes queries and probabilities by itself; the rotation is told in
 * kvmgr_cache_config, hidden states by kvmgr_sequence_observe and kvmgr_sequence_observe_residual,
 * projections by kvmgr_cache_set_weights.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_policy_needs(const kvmgr_policy *policy,
                                uint32_t *out_needs,
                                uint32_t *out_query_window);

/**
 * Scores the tokens of a layer: higher stays.
 *
 * @param out_scores [num_kv_heads, T]
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_policy_score(const kvmgr_policy *policy,
                                const kvmgr_policy_input *input,
                                float *out_scores);

/**
 * Chooses the tokens of a layer that stay. A policy that needs KVMGR_NEEDS_RESIDUAL compares all layers
 * and is KVMGR_UNSUPPORTED here.
 *
 * @param out_kept [num_kv_heads, T]: for each KV head its kept indices, ascending, in front
 * @param out_counts [num_kv_heads]: how many each KV head keeps
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_policy_select(const kvmgr_policy *policy,
                                 const kvmgr_policy_input *input,
                                 uint32_t *out_kept,
                                 uint32_t *out_counts);

/**
 * Lets specs name a score of the engine, such as "mine | adakv | keep(0.5)", in the whole process. On
 * failure destroy is not called.
 *
 * @param name a word that is no stage of the library
 * @param user_data passed to every function
 * @param ops copied; need not outlive the call
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_policy_register_score(const char *name,
                                         void *user_data,
                                         const kvmgr_score_ops *ops);

/**
 * Takes the name of a score back. Policies made with it go on. KVMGR_NOT_FOUND if there is none.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_policy_unregister_score(const char *name);

/**
 * Makes a pool.
 *
 * @param config settings; num_blocks is required
 * @param out_pool receives a handle with one reference; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_create(const kvmgr_pool_config *config,
                               kvmgr_pool **out_pool);

/**
 * Adds a reference; answers the same handle, or NULL if it is not a live pool.
 */
kvmgr_pool *kvmgr_pool_retain(kvmgr_pool *pool);

/**
 * Drops a reference. NULL is fine. Leases keep the pool alive; its sequences end with it.
 */
void kvmgr_pool_release(kvmgr_pool *pool);

/**
 * Sets the clock of a pool in microseconds: leases and times to live that have passed end. The
 * clock is the engine's alone and starts at 0; it never goes back.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_pool_tick(kvmgr_pool *pool, uint64_t now);

/**
 * Reclaims every entry of the prefix index that nobody holds.
 *
 * @param out_num receives how many there were; may be NULL
 */
KVMGR_NODISCARD kvmgr_status kvmgr_pool_clear(kvmgr_pool *pool, size_t *out_num);

/**
 * What KVMGR_POOL_LOG recorded since the last call: operations and decisions, to be put together
 * in order. kvmgr_pool_replay repeats them.
 *
 * @param out room for capacity bytes; NULL with capacity 0 asks for the size alone, takes nothing
 * @param out_size receives the number of bytes
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_take_log(kvmgr_pool *pool,
                                 void *out,
                                 size_t capacity,
                                 size_t *out_size);

/**
 * Repeats a whole log on a new pool. KVMGR_CORRUPT if it is not one, or if any decision differs
 * in a single byte.
 *
 * @param log the bytes of every kvmgr_pool_take_log of one pool, in order
 * @param out_num_operations receives how many operations were repeated
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_replay(const void *log,
                               size_t size,
                               size_t *out_num_operations);

/**
 * Numbers about a pool.
 *
 * @param out_stats its struct_size must be set; receives the numbers
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_get_stats(const kvmgr_pool *pool,
                                  kvmgr_pool_stats *out_stats);

/**
 * The numbers as Prometheus' text exposition format, without a final NUL.
 *
 * @param labels put between braces on every line, such as "pool=\"0\""; NULL means none
 * @param out room for capacity bytes; NULL with capacity 0 asks for the size alone
 * @param out_size receives the number of bytes
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_prometheus(const kvmgr_pool *pool,
                                   const char *labels,
                                   char *out,
                                   size_t capacity,
                                   size_t *out_size);

/**
 * Makes sequences of prompts, in order, until one does not fit. Cached blocks are taken over for
 * the longest known prefix, at most all tokens but the last; blocks for the rest are reserved. The
 * engine writes the rows of the rest and says so with kvmgr_pool_commit.
 *
 * KVMGR_OUT_OF_BLOCKS only if not even the first fits; any other error admits none.
 *
 * @param requests the prompts
 * @param out_admissions room for num_requests
 * @param out_num_admitted receives how many became sequences
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_admit(kvmgr_pool *pool,
                              const kvmgr_pool_request *requests,
                              size_t num_requests,
                              kvmgr_pool_admission *out_admissions,
                              size_t *out_num_admitted);

/**
 * The hashes under which the full blocks of a prompt are cached, for a router, for
 * kvmgr_pool_lookup, or to admit the prompt again and again without hashing.
 *
 * @param request the prompt; only tokens, salt and extra keys count
 * @param out_hashes room for 32 bytes for each full block; NULL with capacity 0 asks for the number
 * @param capacity in hashes
 * @param out_num_hashes receives the number of full blocks
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_hash(kvmgr_pool *pool,
                             const kvmgr_pool_request *request,
                             uint8_t *out_hashes,
                             size_t capacity,
                             size_t *out_num_hashes);

/**
 * Gives each sequence slots for more tokens, or none to any: drafts, or the next message of a
 * conversation. No sequence may occur twice.
 *
 * @param counts tokens for each sequence
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_reserve(kvmgr_pool *pool,
                                const kvmgr_pool_sequence *sequences,
                                const uint32_t *counts,
                                size_t num_sequences);

/**
 * Says that the next reserved tokens of each sequence have been written, for all or none. Blocks
 * that are full can be found by others from now on. Reserved tokens beyond stay reserved;
 * kvmgr_pool_truncate drops them, which is how rejected drafts are undone.
 *
 * @param counts tokens for each sequence
 * @param tokens the ids of those that are not part of an admitted prompt, sequence by sequence
 * @param num_tokens how many those are
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_commit(kvmgr_pool *pool,
                               const kvmgr_pool_sequence *sequences,
                               const uint32_t *counts,
                               size_t num_sequences,
                               const int32_t *tokens,
                               size_t num_tokens);

/**
 * The call of a decode step: says that the reserved token of each sequence has been written and
 * was tokens[i], and reserves the next one. KVMGR_OUT_OF_BLOCKS changes nothing: preempt somebody
 * and call again.
 *
 * @param tokens one for each sequence
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_append(kvmgr_pool *pool,
                               const kvmgr_pool_sequence *sequences,
                               const int32_t *tokens,
                               size_t num_sequences);

/**
 * Forgets the committed tokens from num_tokens on and every reservation. A recurrent group goes back
 * to a cached state, which there is after every `value` blocks: KVMGR_UNSUPPORTED elsewhere,
 * KVMGR_INVALID_STATE if it has been reclaimed or where a window has left those tokens.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_truncate(kvmgr_pool *pool,
                                 kvmgr_pool_sequence sequence,
                                 size_t num_tokens);

/**
 * Makes sequences with the committed tokens of another, which share every block, or none. A block
 * that still fills is copied by whoever reserves in it first: kvmgr_pool_take_copies. A prompt must
 * be committed whole.
 *
 * @param out_children room for num_children
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_fork(kvmgr_pool *pool,
                             kvmgr_pool_sequence parent,
                             kvmgr_pool_sequence *out_children,
                             size_t num_children);

/**
 * Ends sequences, all or none. Their full blocks stay cached until somebody needs the place.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_end(kvmgr_pool *pool,
                            const kvmgr_pool_sequence *sequences,
                            size_t num_sequences);

/**
 * Preempts a sequence: its blocks go, its name and its tokens stay. To keep the bytes, the engine
 * copies the blocks it is told out of its memory before it writes anything. Reservations are
 * dropped.
 *
 * @param out_places room for capacity; NULL with capacity 0 parks without asking
 * @param out_num receives how many blocks there were
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_park(kvmgr_pool *pool,
                             kvmgr_pool_sequence sequence,
                             kvmgr_placement *out_places,
                             size_t capacity,
                             size_t *out_num);

/**
 * Gives a parked sequence blocks again, or KVMGR_OUT_OF_BLOCKS. Blocks that are still cached come
 * back as they are; for the others the engine copies the bytes back or computes them before
 * anything reads them.
 *
 * @param out_places room for as many as kvmgr_pool_park answered: where bytes are missing
 * @param out_num receives how many are missing
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_resume(kvmgr_pool *pool,
                               kvmgr_pool_sequence sequence,
                               kvmgr_placement *out_places,
                               size_t capacity,
                               size_t *out_num);

/**
 * The copies between blocks that the engine makes before it writes anything, in this order.
 * Asking takes them.
 *
 * @param out room for capacity; NULL with capacity 0 asks for the number and takes nothing
 * @param out_num receives how many there are
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_take_copies(kvmgr_pool *pool,
                                    kvmgr_block_copy *out,
                                    size_t capacity,
                                    size_t *out_num);

/**
 * The blocks that were handed out since the last call and still hold the bytes of a sequence before.
 * An engine wipes them, or in a debug build fills them with NaN, before it makes copies or writes.
 * Needs KVMGR_POOL_RECYCLED.
 *
 * @param out room for capacity; NULL with capacity 0 asks for the number and takes nothing
 * @param out_num receives how many there are
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_take_recycled(kvmgr_pool *pool,
                                      uint32_t *out,
                                      size_t capacity,
                                      size_t *out_num);

/**
 * Tokens of a sequence.
 *
 * @param out_committed receives the committed ones; may be NULL
 * @param out_reserved receives those with slots, committed ones included; may be NULL
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_num_tokens(const kvmgr_pool *pool,
                                   kvmgr_pool_sequence sequence,
                                   size_t *out_committed,
                                   size_t *out_reserved);

/**
 * The block tables of a batch for one group, as an attention kernel wants them: row i holds the
 * blocks of sequences[i] in token order, then KVMGR_NO_BLOCK.
 *
 * @param group below num_groups
 * @param out room for num_sequences rows of `columns` blocks; KVMGR_INVALID_ARGUMENT names the
 *   columns that a longer table needs
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_block_tables(const kvmgr_pool *pool,
                                     const kvmgr_pool_sequence *sequences,
                                     size_t num_sequences,
                                     uint32_t group,
                                     uint32_t *out,
                                     size_t columns);

/**
 * The slots of the next reserved tokens of a batch for one group, as a cache-write kernel wants
 * them: block * block_size + row, sequence by sequence; -1 where the group keeps no row. A
 * recurrent group has its state at the block of the last token instead: kvmgr_pool_block_tables.
 *
 * @param counts tokens for each sequence, at most those that are reserved
 * @param out room for capacity slots, at least the sum of counts
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_slot_mapping(const kvmgr_pool *pool,
                                     const kvmgr_pool_sequence *sequences,
                                     const uint32_t *counts,
                                     size_t num_sequences,
                                     uint32_t group,
                                     int64_t *out,
                                     size_t capacity);

/**
 * Holds the longest run of hashes, from the first on, that is cached. Runs beside other lookups.
 *
 * @param hashes 32 bytes for each block, as kvmgr_pool_hash answers them
 * @param group below num_groups
 * @param deadline on the pool's clock, later than now; 0 for none
 * @param out_blocks room for num_hashes blocks; may be NULL
 * @param out_num_found receives how many blocks are held
 * @param out_lease receives an exclusive handle, also if nothing was found; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_lookup(kvmgr_pool *pool,
                               const uint8_t *hashes,
                               size_t num_hashes,
                               uint32_t group,
                               uint64_t deadline,
                               uint32_t *out_blocks,
                               size_t *out_num_found,
                               kvmgr_lease **out_lease);

/**
 * Holds the cached blocks of a sequence beyond its end: a pin.
 *
 * @param deadline on the pool's clock, later than now; 0 for none
 * @param out_lease receives an exclusive handle; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_pin(kvmgr_pool *pool,
                            kvmgr_pool_sequence sequence,
                            uint64_t deadline,
                            kvmgr_lease **out_lease);

/**
 * Moves the deadline of a lease. KVMGR_INVALID_STATE if it has passed.
 *
 * @param deadline on the pool's clock, later than now; 0 for none
 */
KVMGR_NODISCARD kvmgr_status kvmgr_lease_extend(kvmgr_lease *lease, uint64_t deadline);

/**
 * Gives the blocks of a lease back. NULL is fine.
 */
void kvmgr_lease_destroy(kvmgr_lease *lease);

/**
 * Changes what a request said about how long its entries stay, those it made already included.
 *
 * @param priority 1 to 100, or 0 for 35
 * @param ttl microseconds after its end, or 0 for never
 * @param session what it is a state of, or 0
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_keep(kvmgr_pool *pool,
                             kvmgr_pool_sequence sequence,
                             uint32_t priority,
                             uint64_t ttl,
                             uint64_t session);

/**
 * Changes how long a part of a sequence stays: the blocks that its tokens touch, as they are now and
 * as they become entries later. What is said last about a block counts.
 *
 * @param start first token
 * @param end behind the last token, larger than start; may lie beyond the tokens so far
 * @param priority 1 to 100, or 0 for 35
 * @param ttl microseconds after the end of the sequence, or 0 for never
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_keep_range(kvmgr_pool *pool,
                                   kvmgr_pool_sequence sequence,
                                   uint64_t start,
                                   uint64_t end,
                                   uint32_t priority,
                                   uint64_t ttl);

/**
 * Changes how long entries stay whose sequences have ended.
 *
 * @param hashes 32 bytes for each block; unknown ones are passed over
 * @param group below num_groups
 * @param priority 1 to 100, or 0 for 35
 * @param ttl microseconds from now, or 0 for never
 * @param out_num_found receives how many are cached; may be NULL
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_keep_entries(kvmgr_pool *pool,
                                     const uint8_t *hashes,
                                     size_t num_hashes,
                                     uint32_t group,
                                     uint32_t priority,
                                     uint64_t ttl,
                                     size_t *out_num_found);

/**
 * Says that a session has ended: entries of its last state are reclaimed before all others.
 * KVMGR_NOT_FOUND if no sequence of it has ended.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_pool_end_session(kvmgr_pool *pool, uint64_t session);

/**
 * Takes entries out of the index because their content turned out to be wrong. Sequences that use
 * the blocks keep them.
 *
 * @param hashes 32 bytes for each block
 * @param group below num_groups
 * @param out_num_found receives how many there were; may be NULL
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_forget(kvmgr_pool *pool,
                               const uint8_t *hashes,
                               size_t num_hashes,
                               uint32_t group,
                               size_t *out_num_found);

/**
 * Sends what happens to the prefix index to a function, from now on: BlockStored, BlockRemoved and
 * AllBlocksCleared of vLLM. Once for each pool.
 *
 * @param flags 0 or KVMGR_EVENTS_ARRAYS
 * @param num_kept batches kept for kvmgr_pool_replay_events, at least 1
 * @param medium what the events say about the place of the blocks; NULL means "GPU"
 * @param user_data passed to every call
 * @param destroy called once with user_data when the pool ends; may be NULL
 * @param function receives the batches
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_listen(kvmgr_pool *pool,
                               uint32_t flags,
                               uint32_t num_kept,
                               const char *medium,
                               void *user_data,
                               void (*destroy)(void *user_data),
                               kvmgr_events_fn function);

/**
 * Sends the batches from number first on once more, as far as they are kept, to a function.
 *
 * @param first a batch number; older ones than are kept are passed over
 * @param function called within this call, in order
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_replay_events(kvmgr_pool *pool,
                                      uint64_t first,
                                      void *user_data,
                                      kvmgr_events_fn function);

/**
 * Tokens that can be admitted now even if nothing of them is cached, above the watermark.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_pool_num_admissible(const kvmgr_pool *pool,
                                       size_t *out_num_tokens);

/**
 * The order in which to admit requests, as indices: who has waited `patience` microseconds or
 * longer first, so that nobody starves; then tenants in turn; within a tenant the longest cached
 * prefix first.
 *
 * @param available blocks that may be used
 * @param out_order room for num_waiting indices
 * @param out_num_fitting receives how many of them fit one after the other
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_schedule_admission(const kvmgr_waiting *waiting,
                                      size_t num_waiting,
                                      uint64_t patience,
                                      size_t available,
                                      uint32_t *out_order,
                                      size_t *out_num_fitting);

/**
 * Whom to preempt so that `needed` blocks become available, as indices: the lowest priority first,
 * then the youngest; nobody who need not go. KVMGR_OUT_OF_BLOCKS if all of them free too few.
 *
 * @param out_victims room for num_running indices
 * @param out_num_victims receives how many go
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_schedule_preemption(const kvmgr_running *running,
                                       size_t num_running,
                                       size_t needed,
                                       uint32_t *out_victims,
                                       size_t *out_num_victims);

/**
 * Which layers of a prompt keep their blocks on the device when there is room for `available`
 * blocks and each layer needs `per_layer`: as many as fit, spread evenly, so that the others are
 * written out while those are computed.
 *
 * @param num_layers at least 1
 * @param out_on_device room for num_layers bytes: 1 for layers that stay, 0 for others
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_schedule_layers(size_t num_layers,
                                   size_t per_layer,
                                   size_t available,
                                   uint8_t *out_on_device);

/**
 * Makes a cache. A spec that needs what the engine cannot hand over is refused with the stage
 * and what is missing.
 *
 * @param config settings; the model's shape and num_blocks are required
 * @param out_cache receives a handle with one reference; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_cache_create(const kvmgr_cache_config *config,
                                kvmgr_cache **out_cache);

/**
 * Adds a reference; answers the same handle, or NULL if it is not a live cache.
 */
kvmgr_cache *kvmgr_cache_retain(kvmgr_cache *cache);

/**
 * Drops a reference. NULL is fine. Sequences and attention handles keep the cache alive.
 */
void kvmgr_cache_release(kvmgr_cache *cache);

/**
 * Numbers about a cache.
 *
 * @param out_stats its struct_size must be set; receives the numbers
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_cache_get_stats(const kvmgr_cache *cache,
                                   kvmgr_cache_stats *out_stats);

/**
 * Starts a new bytes_peak, and state_bytes_peak, at what is used now.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_cache_reset_peak(kvmgr_cache *cache);

/**
 * Sets the CUDA stream that all work of a cache on a CUDA device is queued on: plans, appends, runs,
 * copies of blocks. At first it is the legacy default stream. The order of the stream is what makes it
 * safe to free blocks at once, so if work is still queued on the old one, the engine makes the new one
 * wait for it. Not while another thread uses the cache.
 *
 * @param stream a CUstream (or cudaStream_t) of the cache's context; NULL is the legacy default stream
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_cache_set_stream(kvmgr_cache *cache,
                                    void *stream);

/**
 * Hands over what a policy needs to know of a layer once (kvmgr_policy_needs). The memory is not
 * copied: it must stay as it is until the cache is destroyed. A sequence whose policy needs it can
 * be made when every layer has it.
 *
 * @param what KVMGR_NEEDS_OUTPUT_PROJECTION: weights is [hidden_size, num_q_heads * value_dim], row
 *        i makes element i of the output
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_cache_set_weights(kvmgr_cache *cache,
                                     uint32_t layer,
                                     uint32_t what,
                                     const kvmgr_tensor *weights);

/**
 * Makes an empty sequence. KVMGR_OUT_OF_BLOCKS if the model has recurrent layers and no state is left.
 *
 * @param policy the policy of this sequence, without quant(...), or NULL for the cache's spec
 * @param out_sequence receives an exclusive handle; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_cache_sequence_create(kvmgr_cache *cache,
                                         const kvmgr_policy *policy,
                                         kvmgr_sequence **out_sequence);

/**
 * Ends a sequence and frees what only it refers to. NULL is fine.
 */
void kvmgr_sequence_destroy(kvmgr_sequence *sequence);

/**
 * Makes a second sequence with the same tokens. It shares every block; the block that still fills
 * is copied by whoever writes first. States of recurrent layers are copied at once, for which one must be
 * free; snapshots are shared. KVMGR_INVALID_STATE while tokens are reserved, and while a graph is captured if
 * something has to be copied at once on a CUDA device.
 *
 * @param out_child receives an exclusive handle; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_fork(const kvmgr_sequence *sequence,
                                 kvmgr_sequence **out_child);

/**
 * Takes over the cached blocks of the longest known prefix of a prompt, from the cache or its
 * store, but always leaves at least one token to compute. The sequence must be empty. The matched
 * tokens are committed: go on with the tokens after them. With recurrent layers a prefix is as long as its
 * last block at whose end a state is kept (kvmgr_sequence_snapshot), which becomes that of the sequence;
 * without one it is 0 tokens.
 *
 * @param tokens the prompt
 * @param out_num_matched receives the number of tokens taken over; 0 without the prefix flag
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_match_prefix(kvmgr_sequence *sequence,
                                         const int32_t *tokens,
                                         size_t num_tokens,
                                         size_t *out_num_matched);

/**
 * Makes room for the next num_tokens tokens in every layer, or answers KVMGR_OUT_OF_BLOCKS and
 * changes nothing. May be called again before a commit. On a CUDA device a shared block that has to be copied
 * first is KVMGR_INVALID_STATE while a graph is captured.
 *
 * @param num_tokens at least 1
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_reserve(kvmgr_sequence *sequence,
                                    size_t num_tokens);

/**
 * Writes the keys and values of the next reserved tokens of one layer; several calls continue one
 * another. kvmgr_attention_append does the same for a whole batch with several workers.
 *
 * @param layer below num_layers
 * @param key [n, num_kv_heads, head_dim], rotated as the model wants it
 * @param value [n, num_kv_heads, value_dim]; NULL with KVMGR_CACHE_VALUES_IN_KEYS
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_append(kvmgr_sequence *sequence,
                                   uint32_t layer,
                                   const kvmgr_tensor *key,
                                   const kvmgr_tensor *value);

/**
 * Hands over what the policy needs to know of the reserved tokens in a layer
 * (kvmgr_policy_needs), once for each layer before they are committed. A policy that does not need it
 * does not look at it.
 *
 * @param layer below num_layers
 * @param what KVMGR_NEEDS_HIDDEN, also for KVMGR_NEEDS_REPLAY_HIDDEN while tokens replay
 * @param rows [reserved tokens, hidden_size]: the input of attention, after its norm
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_observe(kvmgr_sequence *sequence,
                                    uint32_t layer,
                                    uint32_t what,
                                    const kvmgr_tensor *rows);

/**
 * Hands over how attention of a layer changes the residual stream of the reserved tokens
 * (KVMGR_NEEDS_RESIDUAL), once for each layer before they are committed. Both rows are at hand just
 * before the engine adds one to the other, in place or not. They are not kept, only the cosine between
 * the stream before and after. Only tokens of the prompt that the engine computes count, not those of a
 * shared prefix: a policy that does not need it, and any after kvmgr_sequence_end_prefill, does not look
 * at it.
 *
 * @param layer below num_layers
 * @param hidden [reserved tokens, hidden_size]: the residual stream that the layer reads, before its norm
 * @param added [reserved tokens, hidden_size]: what is added to it, attention after its output projection
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_observe_residual(kvmgr_sequence *sequence,
                                             uint32_t layer,
                                             const kvmgr_tensor *hidden,
                                             const kvmgr_tensor *added);

/**
 * Starts a replay (KVMGR_NEEDS_REPLAY): the engine feeds a request to repeat the prompt and then
 * tokens first to first + num of it once more, behind the prompt: reserve, append, attend. What that
 * reads of the prompt is noted, and kvmgr_sequence_commit of 0 tokens ends the replay, of which nothing
 * is left. With recurrent layers there must be a snapshot of the prompt's length. Long prompts are replayed in pieces. Before kvmgr_sequence_end_prefill.
 *
 * @param first the first token that is replayed
 * @param num_tokens at least 1
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_replay(kvmgr_sequence *sequence,
                                   size_t first,
                                   size_t num_tokens);

/**
 * Makes the first num_tokens reserved tokens real and drops the others, which is how rejected
 * drafts are undone. Blocks that are full are encoded and, with the prefix flag, shared. After
 * kvmgr_sequence_end_prefill this is a decode step and runs the decode phase of the policy; if
 * that runs out of blocks the tokens are committed all the same and the next step tries again.
 * If reserved tokens are dropped and there is a snapshot after the committed ones, the states of recurrent
 * layers are set back to it, or as kvmgr_sequence_truncate does it; else they stay as the engine has written
 * them, unless there are snapshots after some of the reserved tokens: then the answer is KVMGR_INVALID_STATE.
 * On a CUDA device the encoding of full blocks is queued on the stream; while a graph is captured they stay
 * open and are encoded by a later commit. A policy that acts waits for the stream; while a graph is captured
 * a commit that may run one answers KVMGR_INVALID_STATE and changes nothing.
 *
 * @param tokens the ids of the tokens, or NULL: the sequence is not shared by prefix from then on
 * @param num_tokens 0 to the number reserved
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_commit(kvmgr_sequence *sequence,
                                   const int32_t *tokens,
                                   size_t num_tokens);

/**
 * Says that the prompt, or one more piece of it, has been read: runs the prefill phase of the
 * policy. Commits are decode steps from then on. If it runs out of blocks, lanes that were
 * compacted already stay so, and the call may be repeated. On a CUDA device a policy waits for the stream,
 * which must not be captured.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_end_prefill(kvmgr_sequence *sequence);

/**
 * Forgets the tokens at position num_tokens and above, and any reservation, and ends a replay. With
 * recurrent layers their states are set back to a snapshot of that length, to what the prefix keeps there,
 * or to zeros at 0; if committed tokens would go and there is none, the answer is KVMGR_INVALID_STATE. At 0
 * the sequence starts anew: what comes is a prompt until kvmgr_sequence_end_prefill.
 *
 * @param num_tokens 0 to the number of committed tokens
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_truncate(kvmgr_sequence *sequence,
                                     size_t num_tokens);

/**
 * The number of committed tokens, evicted ones included: the position of the next token.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_length(const kvmgr_sequence *sequence,
                                   size_t *out_num_tokens);

/**
 * The number of rows that one KV head of one layer holds, reserved ones included.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_kept(const kvmgr_sequence *sequence,
                                 uint32_t layer,
                                 uint32_t kv_head,
                                 size_t *out_num_tokens);

/**
 * The original positions of the rows of one KV head, ascending; those that a policy has demoted come
 * first, in blocks of their own that each ascend.
 *
 * @param out_positions room for capacity numbers; NULL with capacity 0 asks for the length only
 * @param out_num receives the length
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_positions(const kvmgr_sequence *sequence,
                                      uint32_t layer,
                                      uint32_t kv_head,
                                      int32_t *out_positions,
                                      size_t capacity,
                                      size_t *out_num);

/**
 * The block table of one KV head.
 *
 * @param out_blocks room for capacity numbers; NULL with capacity 0 asks for the length only
 * @param out_num receives the length
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_block_table(const kvmgr_sequence *sequence,
                                        uint32_t layer,
                                        uint32_t kv_head,
                                        uint32_t *out_blocks,
                                        size_t capacity,
                                        size_t *out_num);

/**
 * Where the reserved tokens go: block * block_size + row, in order.
 *
 * @param out_slots room for capacity numbers; NULL with capacity 0 asks for the length only
 * @param out_num receives the length
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_slot_mapping(const kvmgr_sequence *sequence,
                                         uint32_t layer,
                                         uint32_t kv_head,
                                         int64_t *out_slots,
                                         size_t capacity,
                                         size_t *out_num);

/**
 * The copies that an engine with its own tensors must make before it writes to the reserved
 * slots. They are handed out once. Caches with memory copy by themselves.
 *
 * @param out_copies room for capacity copies; NULL with capacity 0 asks for the length only
 * @param out_num receives the length
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_take_copies(kvmgr_sequence *sequence,
                                        kvmgr_block_copy *out_copies,
                                        size_t capacity,
                                        size_t *out_num);

/**
 * Moves the bytes of a sequence to a store and frees its blocks. The states of recurrent layers go with
 * them, snapshots are dropped. Until it is resumed, calls that
 * need them answer KVMGR_INVALID_STATE. The sequence keeps a reference to the store.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_preempt(kvmgr_sequence *sequence,
                                    kvmgr_store *store);

/**
 * Brings the bytes of a preempted sequence back. On failure it stays preempted and the call may
 * be repeated; KVMGR_OUT_OF_BLOCKS says that there is no room yet.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_sequence_resume(kvmgr_sequence *sequence);

/**
 * Numbers about a sequence.
 *
 * @param out_stats its struct_size must be set; receives the numbers
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_get_stats(const kvmgr_sequence *sequence,
                                      kvmgr_sequence_stats *out_stats);

/**
 * The state of a recurrent layer of a sequence, which the engine reads and writes in place. It is zero
 * at first, aligned to 64 bytes, and stays at its address until the sequence is destroyed or preempted.
 * On a CUDA device the address is one of device memory, and whatever this library does to a state is
 * queued on the stream of the cache.
 *
 * Every token changes a state, and a state cannot be cut like rows of keys, so the engine says where it
 * may want to go back to: kvmgr_sequence_snapshot. With drafts, one of
 *   snapshot(n); reserve k; run; commit(0): the state is as before; reserve m; run again; commit(m)
 *   reserve k; snapshot(n + i) after i drafts, 0 to k; commit(m): the state is that after the good ones
 *   reserve k; run with states of the drafts in memory of the engine; write the right one; commit(m)
 *
 * @param layer below recurrent_layers: recurrent layers are numbered apart from those with keys and values
 * @param out_state receives the address of the first byte
 * @param out_bytes receives recurrent_bytes; may be NULL
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_recurrent_state(const kvmgr_sequence *sequence,
                                            uint32_t layer,
                                            void **out_state,
                                            size_t *out_bytes);

/**
 * Keeps a copy of the states of all recurrent layers as those after num_tokens tokens, until the
 * sequence gets shorter than that, is preempted or ends. It takes the place of one of the same length;
 * else, if there are recurrent_snapshots of them already, that of the one taken first. KVMGR_OUT_OF_BLOCKS,
 * and no change, if num_states is reached. Costs one copy of the states, and no allocation but where the
 * prefix keeps it.
 *
 * A snapshot at the end of a block whose tokens are shared by prefix is kept with the prefix: another
 * sequence starts from there. The last such length of a prompt of n tokens that a prompt like it can
 * use is (n - 1) / block_size * block_size; prompts that share less need one at the end of what they
 * share. If no state is free, those that only prefixes keep are dropped or go to the store of the cache,
 * least recently used first.
 *
 * @param num_tokens from the committed tokens to those and all reserved ones: what the states, as they
 *        are now, have seen
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_snapshot(kvmgr_sequence *sequence,
                                     size_t num_tokens);

/**
 * Sets the states of all recurrent layers back to those after num_tokens tokens, from a snapshot or from
 * what the prefix keeps; 0 makes them zero. Forgets no token: kvmgr_sequence_truncate, which does both,
 * and kvmgr_sequence_commit of fewer tokens than are reserved do this by themselves.
 * KVMGR_INVALID_STATE if there is no snapshot of that length.
 *
 * @param num_tokens from the committed tokens to those and all reserved ones
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_restore(kvmgr_sequence *sequence,
                                    size_t num_tokens);

/**
 * The lengths of the snapshots of a sequence, ascending. What prefixes keep is not among them.
 *
 * @param out_lengths room for capacity numbers; NULL with capacity 0 asks for their number only
 * @param out_num receives their number
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_sequence_snapshots(const kvmgr_sequence *sequence,
                                      size_t *out_lengths,
                                      size_t capacity,
                                      size_t *out_num);

/**
 * Makes an attention handle for the sequences of a cache. On a CUDA device this loads the kernels,
 * which the driver compiles the first time.
 *
 * @param out_attention receives an exclusive handle; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_create(kvmgr_cache *cache,
                                    kvmgr_attention **out_attention);

/**
 * Ends an attention handle. NULL is fine.
 */
void kvmgr_attention_destroy(kvmgr_attention *attention);

/**
 * Plans one step: a snapshot of the block tables. Sequence i contributes its last num_queries[i]
 * tokens, reserved ones included; their rows follow each other in Q, K, V, O and LSE. If one of
 * the sequences changes afterwards, append and run answer KVMGR_INVALID_STATE. On failure the
 * previous plan is gone. This is the only call that allocates, but for a selector in the spec: the first
 * run after a block was sealed grows what it knows of the blocks. On a CUDA device `run` never allocates; with
 * a selector plan waits for the stream if there are new blocks that came encoded from a store.
 *
 * @param sequences num_sequences different sequences of the handle's cache
 * @param num_queries num_sequences numbers, each at least 1
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_plan(kvmgr_attention *attention,
                                  kvmgr_sequence *const *sequences,
                                  const uint32_t *num_queries,
                                  size_t num_sequences);

/**
 * Restricts a layer of the current plan to blocks: selected attention, such as Quest. KV head h of
 * the batch's sequence s attends to blocks[starts[i]] to blocks[starts[i + 1] - 1] with
 * i = s * num_kv_heads + h: ascending indices into the block table of its lane. The blocks that
 * hold the planned tokens are attended in any case, so an empty list leaves those. It holds for
 * the runs of this layer until the next plan, and comes before what a selector in the spec would
 * choose. On failure the layer is back to all blocks.
 * Wants the handle alone; allocates only while its buffers still grow.
 *
 * On a CUDA device it queues one copy, and not while the stream is being captured; graphs serve later lists
 * of the same layers (kvmgr_attention_graph_key). A sliding window then must not reach over blocks that
 * are not selected: run answers KVMGR_UNSUPPORTED.
 *
 * @param layer below num_layers
 * @param starts num_sequences * num_kv_heads + 1 ascending numbers, the first 0 and the last
 *        num_blocks
 * @param num_starts length of starts, checked against the plan
 * @param blocks num_blocks indices; may be NULL if num_blocks is 0
 * @param num_blocks length of blocks
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_select(kvmgr_attention *attention,
                                    uint32_t layer,
                                    const uint32_t *starts,
                                    size_t num_starts,
                                    const uint32_t *blocks,
                                    size_t num_blocks);

/**
 * What the current plan shares between sequences. Fewer than 128 rows are not shared, nor is anything on a
 * CUDA device, or by sequences that have more than 8 planned tokens, are cache relative, have a selector or
 * a replay, or whose policy wants to know what rows receive.
 *
 * @param out_stats its struct_size must be set; receives the numbers
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_get_stats(const kvmgr_attention *attention,
                                       kvmgr_attention_stats *out_stats);

/**
 * Writes K and V of the planned tokens into the rows that were reserved for them.
 *
 * On a CUDA device K and V are of one dtype, any, with rows aligned to 16 bytes; worker 0 launches one
 * kernel on the cache's stream, the other workers have nothing to do. No allocation, no waiting, so the
 * call can be captured into a graph.
 *
 * @param layer below num_layers
 * @param key [planned tokens, num_kv_heads, head_dim], rotated as the model wants it
 * @param value [planned tokens, num_kv_heads, value_dim]; NULL with KVMGR_CACHE_VALUES_IN_KEYS
 * @param worker which part of the work to do, below num_workers. The caller waits for all parts
 *        before it runs the layer.
 * @param num_workers parts; 0 (with worker 0) lets the library's own threads do all of them
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_append(const kvmgr_attention *attention,
                                    uint32_t layer,
                                    const kvmgr_tensor *key,
                                    const kvmgr_tensor *value,
                                    uint32_t worker,
                                    uint32_t num_workers);

/**
 * Attends for the planned tokens: output = softmax(query . K) V. Token i of n of a sequence sees
 * all earlier tokens that were kept and itself. A query that sees nothing gets zeros and -inf.
 *
 * On a CUDA device Q and O are of the cache's dtype with rows aligned to 16 bytes, LSE is f32 with
 * neighbouring heads; worker 0 launches one kernel on the cache's stream, or two if the plan has decode
 * steps and prompts, as kvmgr_attention_append does, and one more for each of these that a policy asks for: the
 * last queries, what rows receive, a list of blocks. A sliding_window in which a policy has evicted tokens is
 * KVMGR_UNSUPPORTED there. What rows receive there (h2o) is from all planned queries, also those of drafts
 * that are not committed later.
 *
 * From compute capability 9.0 on, decode steps start while the kernel before them on the stream ends
 * (programmatic dependent launch), and read rows of earlier steps before they wait for it. So rows of the step
 * and Q may be written by that kernel, whoever launches it; rows of earlier steps must be complete before a
 * kernel that calls griddepcontrol.launch_dependents is launched in front of run. What this library queues
 * obeys.
 *
 * @param layer below num_layers; all its reserved rows must have been appended. Layers of a model that
 *        share the keys and values of one (CLA, YOCO, KVSharer) run with the layer that holds them.
 * @param query [planned tokens, num_q_heads, head_dim]
 * @param output [planned tokens, num_q_heads, value_dim]
 * @param lse [planned tokens, num_q_heads]: receives the log-sum-exp of the logits; may be NULL
 * @param options may be NULL
 * @param worker which part of the work to do, below num_workers. The caller waits for all parts
 *        before it runs another layer; after a run that lacks parts it plans again.
 * @param num_workers parts; 0 (with worker 0) lets the library's own threads do all of them
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_run(const kvmgr_attention *attention,
                                 uint32_t layer,
                                 const kvmgr_tensor *query,
                                 const kvmgr_tensor *output,
                                 const kvmgr_tensor *lse,
                                 const kvmgr_attention_options *options,
                                 uint32_t worker,
                                 uint32_t num_workers);

/**
 * Takes the device memory that plans need, so that no later plan within these limits takes more:
 * kvmgr_attention_graph_key then stays the same. Without it the memory grows in kvmgr_attention_plan, and
 * with it where policies have left sequences in more pieces than they have blocks. What selectors, selected
 * blocks and policies that want to know what rows receive need beside it is taken by the first plan or
 * selection of that kind, at once for these limits. Not counted is memory of single sequences, which no key
 * depends on: plans take it for policies that want the last queries or what rows receive. The current plan is
 * gone, but not if the stream is being captured: that is KVMGR_INVALID_STATE and changes nothing. CUDA only.
 *
 * @param max_sequences most sequences of a plan
 * @param max_queries most tokens of a plan, over all sequences
 * @param max_blocks most blocks of a plan in one layer, over all sequences and their lanes
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_reserve(kvmgr_attention *attention,
                                     size_t max_sequences,
                                     size_t max_queries,
                                     size_t max_blocks);

/**
 * A number that says what a CUDA graph is good for. Capture kvmgr_attention_append and
 * kvmgr_attention_run of all layers under one plan; after another kvmgr_attention_plan with the same
 * number, launching that graph does the work of that plan: what changes from plan to plan is read
 * from device memory. The number depends on how many tokens are planned and on what policies want to know of
 * them, not on how long sequences are, as long as the plan's device memory has not grown; kvmgr_attention_reserve sizes it once.
 * Plan outside of the capture. CUDA only.
 *
 * @param out_key receives the number
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attention_graph_key(const kvmgr_attention *attention,
                                       uint64_t *out_key);

/**
 * Says that a graph with the appends of all layers was launched for the current plan, instead of
 * kvmgr_attention_append, so that the tokens can be committed. CUDA only.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_attention_graph_launched(kvmgr_attention *attention);

/**
 * Makes a place for the workers of an attention to meet.
 *
 * @param out_meeting receives the handle; NULL on failure
 */
KVMGR_NODISCARD kvmgr_status kvmgr_meeting_create(kvmgr_meeting **out_meeting);

/**
 * Ends a meeting place. NULL is fine.
 */
void kvmgr_meeting_destroy(kvmgr_meeting *meeting);

/**
 * Attends to keys and values in the engine's own memory, under its mask. Needs no handle.
 *
 * @param query [num_queries, num_q_heads, key_dim]
 * @param key [rows, num_kv_heads, key_dim]
 * @param value [rows, num_kv_heads, value_dim]
 * @param mask [num_queries, 1 or num_q_heads, rows]; NULL shows all
 * @param output [num_queries, num_q_heads, value_dim]
 * @param options may be NULL
 * @param worker which part of the work to do, below num_workers
 * @param num_workers parts, at least 1; the output is complete when all are done
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_attend_dense(const kvmgr_tensor *query,
                                const kvmgr_tensor *key,
                                const kvmgr_tensor *value,
                                const kvmgr_tensor *mask,
                                const kvmgr_tensor *output,
                                const kvmgr_mask_options *options,
                                uint32_t worker,
                                uint32_t num_workers);

/**
 * Checks a spec before shapes are known: a stage that slots cannot serve is refused by name.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_slots_check_spec(const char *spec);

/**
 * Makes the empty slots of a layer.
 *
 * @param config settings; the shape is required
 * @param out_slots receives an exclusive handle; NULL on failure
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_create(const kvmgr_slots_config *config,
                                kvmgr_slots **out_slots);

/**
 * Ends slots. NULL is fine.
 */
void kvmgr_slots_destroy(kvmgr_slots *slots);

/**
 * Writes the keys or the values of slots: new tokens, whatever the slots held before.
 *
 * @param indices num different slots, in the order of their tokens
 * @param values [num, num_kv_heads, dim of the side], keys rotated as the model wants it
 * @param flags KVMGR_SLOTS_SAME_TOKENS or 0
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_write(kvmgr_slots *slots,
                               kvmgr_side side,
                               const uint32_t *indices,
                               size_t num,
                               const kvmgr_tensor *values,
                               uint32_t flags);

/**
 * Decodes the keys or the values of slots.
 *
 * @param out_values [num, num_kv_heads, dim of the side]; zeros where a head holds nothing
 * @param out_states [num, num_kv_heads]: KVMGR_SLOT_ABSENT, LIVE or EVICTED; may be NULL
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_read(const kvmgr_slots *slots,
                              kvmgr_side side,
                              const uint32_t *indices,
                              size_t num,
                              float *out_values,
                              uint8_t *out_states);

/**
 * Evicts the tokens of slots from one KV head and frees their memory. They are remembered as
 * evicted, for instance to restore a saved state.
 *
 * @param kv_head below num_kv_heads
 * @param indices num slots
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_evict(kvmgr_slots *slots,
                               uint32_t kv_head,
                               const uint32_t *indices,
                               size_t num);

/**
 * Makes every slot of a stream absent and frees its memory.
 */
KVMGR_NODISCARD kvmgr_status kvmgr_slots_clear(kvmgr_slots *slots, uint32_t stream);

/**
 * Makes one stream a copy of another, evicted slots included.
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_copy_stream(kvmgr_slots *slots,
                                     uint32_t source,
                                     uint32_t target);

/**
 * Tells the policy about a batch that is written and has not attended yet, and runs the policy
 * where it is due. A query continues the sequence of another if it sees its slot; a sequence that
 * goes on with a single query has ended its prompt, and so has one that goes on with drafts: with at
 * most 17 queries after as few, or after some of the last ones have been taken back. An engine
 * without a policy need not call it.
 *
 * @param query [num_queries, num_q_heads, key_dim]
 * @param mask [num_queries, 1 or num_q_heads, visible slots of the stream]
 * @param indices num_queries slots: where the token of each query was written
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_observe(kvmgr_slots *slots,
                                 uint32_t stream,
                                 const kvmgr_tensor *query,
                                 const kvmgr_tensor *mask,
                                 const uint32_t *indices,
                                 size_t num_queries);

/**
 * Runs the policy at once for prompts that wait for their end and among whose tokens are these slots.
 * To be called before slots are read to save them: a saved state says what was evicted, but not that
 * the policy has yet to run.
 *
 * @param indices num slots
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_settle(kvmgr_slots *slots,
                                const uint32_t *indices,
                                size_t num);

/**
 * Attends to the first slots of a stream: output = softmax(scale * query . K + mask) V. What is
 * hidden by negative infinity, absent or evicted takes no part; a query that sees nothing gets
 * zeros.
 *
 * @param query [num_queries, num_q_heads, key_dim]
 * @param mask [num_queries, 1 or num_q_heads, visible slots of the stream]; NULL shows all
 * @param output [num_queries, num_q_heads, value_dim]
 * @param options may be NULL
 * @param worker which part of the work to do, below num_workers
 * @param num_workers parts, at least 1; the output is complete when all are done
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_attend(const kvmgr_slots *slots,
                                uint32_t stream,
                                const kvmgr_tensor *query,
                                const kvmgr_tensor *mask,
                                const kvmgr_tensor *output,
                                const kvmgr_mask_options *options,
                                uint32_t worker,
                                uint32_t num_workers);

/**
 * Numbers about the slots of a layer.
 *
 * @param out_stats its struct_size must be set; receives the numbers
 */
KVMGR_NODISCARD
kvmgr_status kvmgr_slots_get_stats(const kvmgr_slots *slots,
                                   kvmgr_slots_stats *out_stats);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVMGR_H */
