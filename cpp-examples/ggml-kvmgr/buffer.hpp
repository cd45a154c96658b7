// The buffer type of the plugin: where llama.cpp puts the KV cache.
#pragma once
#include "ggml-backend.h"

// `device` becomes the owner of the type.
ggml_backend_buffer_type_t kvmgr_buffer_type(ggml_backend_dev_t device);
