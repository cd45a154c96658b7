// The operations of the plugin: SET_ROWS, FLASH_ATTN_EXT, and ROPE on cached keys (context shift).
#pragma once
#include "ggml.h"
#include "team.hpp"

bool supports(const ggml_tensor *op);
bool compute(ggml_tensor *op, const Team &team);
