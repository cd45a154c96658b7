# make demo     builds everything and compares cache specs with the tiny model
# make pareto   quality against KV bytes of every policy and combinations (half an hour)
# make quality  the same for every quantizer (docs/QUANTIZERS.md)
# make test     every check of the project
# make test-plugin  the ggml plugin inside llama.cpp, where that is built
# make install  PREFIX=/usr/local DESTDIR=
# make bench    every benchmark
# make bench-peers  the block manager beside kvbm-logical
# make simulate     hit rate by evictor and size of the pool: SIMULATE="--log FILE --plot FILE"
# make test-loom    the block pool's shared part under a model checker

CARGO   ?= cargo
PREFIX  ?= /usr/local
DESTDIR ?=
TARGET  := $(or $(CARGO_TARGET_DIR),target)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
SONAME  := libkvmgr.so.$(basename $(VERSION))
OUT     ?= $(TARGET)/cpp-examples

.PHONY: demo pareto quality lib examples test test-install test-plugin test-loom install bench \
  bench-peers simulate clean

demo: examples
	$(OUT)/kvmgr-compare tests/data/tiny.gguf --text tests/data/heldout.txt \
	  --recall tests/data/recall.txt --out $(OUT)/report

pareto: examples
	$(OUT)/kvmgr-pareto tests/data/tiny.gguf --text tests/data/heldout.txt \
	  --recall tests/data/recall.txt --out $(OUT)/pareto

quality: examples
	$(OUT)/kvmgr-compare tests/data/tiny.gguf --text tests/data/heldout.txt \
	  --recall tests/data/recall.txt --quantizers --out $(OUT)/quantizers

# The crate types are named alone: with `lib` among them cargo switches LTO off.
lib:
	$(CARGO) rustc --quiet --release --lib --crate-type cdylib,staticlib
	ln -sf libkvmgr.so $(TARGET)/release/$(SONAME)

examples: lib
	$(MAKE) --no-print-directory -C cpp-examples KVMGR_LIB=$(abspath $(TARGET))/release \
	  KVMGR_INCLUDE=$(abspath include) OUT=$(abspath $(OUT))

test: examples test-install
	rustfmt --edition 2024 --check $$(git ls-files '*.rs')
	$(CARGO) clippy --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --no-deps --quiet
	KVMGR_EXAMPLES=$(abspath $(OUT)) KVMGR_SHIP=$(abspath $(TARGET))/release $(CARGO) test
	KVMGR_CPU=scalar $(CARGO) test --quiet --test attention --test quantizer_golden
	KVMGR_CPU=avx2 $(CARGO) test --quiet --test attention
	$(CARGO) bench --quiet -- --test

# What an engine does with an installation: the shared and the static library, by plain flags.
test-install: STAGE := $(abspath $(OUT))/stage
test-install: lib
	rm -rf $(STAGE)
	$(MAKE) --no-print-directory install DESTDIR=$(STAGE) PREFIX=/usr
	gcc -std=c99 cpp-examples/01-hello.c -I$(STAGE)/usr/include -L$(STAGE)/usr/lib -lkvmgr \
	  -Wl,-rpath,$(STAGE)/usr/lib -o $(STAGE)/hello-shared
	$(STAGE)/hello-shared
	gcc -std=c99 cpp-examples/01-hello.c -I$(STAGE)/usr/include $(STAGE)/usr/lib/libkvmgr.a \
	  $$(sed -n 's/^Libs.private: //p' $(STAGE)/usr/lib/pkgconfig/kvmgr.pc) -o $(STAGE)/hello-static
	$(STAGE)/hello-static

# The plugin inside the unmodified binaries of llama.cpp; build them with
# cpp-examples/ggml-kvmgr/build-llama.sh first.
LLAMA ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvmgr-llama
test-plugin: lib
	@if [ ! -x $(LLAMA)/build/bin/llama-server ]; then \
	  echo "SKIP test-plugin: no llama.cpp in $(LLAMA)"; \
	else \
	  $(MAKE) --no-print-directory -C cpp-examples/ggml-kvmgr LLAMA=$(LLAMA) \
	    KVMGR_LIB=$(abspath $(TARGET))/release KVMGR_INCLUDE=$(abspath include) \
	    OUT=$(abspath $(OUT))/ggml-kvmgr && \
	  $(LLAMA)/venv/bin/python cpp-examples/ggml-kvmgr/test.py $(LLAMA)/build \
	    $(abspath $(OUT))/ggml-kvmgr/libggml-kvmgr.so tests/data/tiny.gguf tests/data/heldout.txt; \
	fi

# Every interleaving of the block pool's shared part, with a model checker.
test-loom:
	RUSTFLAGS="--cfg loom" $(CARGO) test --release --manifest-path tests/loom/Cargo.toml \
	  --target-dir $(TARGET)/loom

bench:
	$(CARGO) bench

# The block manager beside kvbm-logical (89 crates, downloaded and linked), in one process.
bench-peers:
	$(CARGO) run --release --manifest-path benches/peers/Cargo.toml --target-dir $(TARGET)/peers

# Hit rates of recorded or synthetic traces, by evictor and size of the pool.
simulate:
	$(CARGO) run --quiet --release --example simulate -- $(SIMULATE)

install: lib
	install -d $(DESTDIR)$(PREFIX)/lib/pkgconfig $(DESTDIR)$(PREFIX)/lib/cmake/kvmgr \
	  $(DESTDIR)$(PREFIX)/include
	install -m 644 include/kvmgr.h include/kvmgr.hpp $(DESTDIR)$(PREFIX)/include/
	install -m 755 $(TARGET)/release/libkvmgr.so $(DESTDIR)$(PREFIX)/lib/libkvmgr.so.$(VERSION)
	ln -sf libkvmgr.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/$(SONAME)
	ln -sf $(SONAME) $(DESTDIR)$(PREFIX)/lib/libkvmgr.so
	install -m 644 $(TARGET)/release/libkvmgr.a $(DESTDIR)$(PREFIX)/lib/
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' include/kvmgr.pc.in \
	  > $(DESTDIR)$(PREFIX)/lib/pkgconfig/kvmgr.pc
	sed -e 's|@VERSION@|$(VERSION)|' include/kvmgr-config.cmake.in \
	  > $(DESTDIR)$(PREFIX)/lib/cmake/kvmgr/kvmgr-config.cmake

clean:
	$(CARGO) clean
