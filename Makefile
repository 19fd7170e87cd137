# gptd: `make run` serves the demo model, `make check` runs every test; both install what is missing first.
# `make` alone builds build/gptd. Variables: PORT, HOST, MODEL (make run); BUILD; SAN=address|thread.

.DEFAULT_GOAL := all
.SUFFIXES:
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DELETE_ON_ERROR:

BUILD ?= build
SAN ?=
V ?=
Q := $(if $(V),,@)
say = $(if $(V),,@printf '  %-4s %s\n' '$(1)' '$(2)')
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= models/demo

VERSION := $(shell cat VERSION)
CC := gcc
CXX := g++
OPT := -O2
WARN := -Wall -Wextra -Werror
CPPFLAGS := -I. -D_GNU_SOURCE -DGPTD_VERSION='"$(VERSION)"'
CFLAGS := -std=c11 $(OPT) -g $(WARN) -pthread -fno-math-errno -ffp-contract=off
CXXFLAGS := -std=c++17 $(OPT) -g $(WARN) -pthread
LDFLAGS := -pthread
ifeq ($(SAN),address)
  SANFLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
else ifeq ($(SAN),thread)
  SANFLAGS := -fsanitize=thread -fno-omit-frame-pointer
else ifeq ($(SAN),fuzzer)
  SANFLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
  CFLAGS += -fsanitize=fuzzer-no-link
endif
CFLAGS += $(SANFLAGS)
CXXFLAGS += $(SANFLAGS)
LDFLAGS += $(SANFLAGS)

# ---- sources: one archive per folder, linked in the order of the dependencies ----

KERNELS_SRC := $(wildcard kernels/*.c kernels/cpu/*.c)
SIMD_SRC := $(wildcard kernels/cpu/simd/*.c)
MODELS_SRC := $(wildcard models/*.c)
ENGINE_SRC := $(wildcard engine/*.c)
TOKENIZER_SRC := $(wildcard tokenizer/*.c tokenizer/*.cc)
SERVER_SRC := $(filter-out server/main.c,$(wildcard server/*.c))
SERVER_FILES := $(wildcard server/openapi.json server/page/*) # linked in as they are

objects = $(patsubst %,$(BUILD)/obj/%.o,$(1))

# The inner loops are compiled once per instruction set and chosen at run time.
MACHINE := $(shell uname -m)
ISAS := generic
ifeq ($(MACHINE),x86_64)
  ISAS += avx2 avx512 avx512bf16
endif
ISA_FLAGS_generic :=
ISA_FLAGS_avx2 := -mavx2 -mfma -mf16c
ISA_FLAGS_avx512 := $(ISA_FLAGS_avx2) -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
ISA_FLAGS_avx512bf16 := $(ISA_FLAGS_avx512) -mavx512bf16
SIMD_OBJ := $(foreach isa,$(ISAS),$(patsubst kernels/cpu/simd/%.c,$(BUILD)/obj/kernels/cpu/simd/%.$(isa).o,$(SIMD_SRC)))

LIBS_GPTD := $(addprefix $(BUILD)/lib,$(addsuffix .a,server engine models tokenizer kernels))
# As unpacked from the tarball, with libraries of its own; an RPATH, for it also holds for the libraries' libraries.
RPATH := -Wl,--disable-new-dtags,-rpath,'$$ORIGIN/lib'
LIBS_SYSTEM = $(shell pkg-config --libs libmicrohttpd gnutls sentencepiece libpcre2-8 libutf8proc) -lcjson -lstdc++ -lm -ldl

# ---- the CUDA backend: a library of its own beside the program, where there is nvcc ----

NVCC := $(shell command -v nvcc)
CUDA_LIB := $(BUILD)/libgptd_cuda.so
CUDA_SRC := $(wildcard kernels/cuda/*.cu)
CUDA_OBJ := $(patsubst kernels/cuda/%.cu,$(BUILD)/obj/kernels/cuda/%.o,$(CUDA_SRC))
CUDA_C_OBJ := $(patsubst %,$(BUILD)/obj/pic/%.o,kernels/error.c kernels/dtype.c)
# sm_80 and its PTX run on every later GPU; sm_90a is Hopper's own.
CUDA_ARCH := -gencode 'arch=compute_80,code=[sm_80,compute_80]' -gencode arch=compute_90a,code=sm_90a
# Where it looks for cuBLASLt before it asks the system.
CUBLAS_DIRS := $$ORIGIN:$$ORIGIN/lib:/usr/local/cuda/lib64:/usr/local/cuda-13/lib64:/usr/local/cuda-12/lib64:/opt/cuda/lib64
NVCCFLAGS := -O3 -std=c++17 -I. -D_GNU_SOURCE -lineinfo --compress-mode=size \
  -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror

.PHONY: all run check clean cuda
all: $(BUILD)/gptd $(if $(SAN),,$(if $(NVCC),$(CUDA_LIB)))
cuda: $(CUDA_LIB)

$(CUDA_LIB): $(CUDA_OBJ) $(CUDA_C_OBJ)
	$(call say,LINK,$@)
	$(Q)$(NVCC) -shared -cudart static -o $@ $^ -lcublasLt -Xlinker -z,defs,-z,now,-soname,libgptd_cuda.so \
	  -Xlinker '-rpath,$(CUBLAS_DIRS)'
$(BUILD)/obj/kernels/cuda/%_hopper.o: CUDA_ARCH := -gencode arch=compute_90a,code=sm_90a
$(BUILD)/obj/kernels/cuda/%.o: kernels/cuda/%.cu
	@mkdir -p $(@D)
	$(call say,NVCC,$<)
	$(Q)$(NVCC) $(NVCCFLAGS) $(CUDA_ARCH) -MMD -MP -c -o $@ $<
$(BUILD)/obj/pic/%.c.o: %.c
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -fPIC -fvisibility=hidden -MMD -MP -c -o $@ $<

$(BUILD)/gptd: $(call objects,server/main.c) $(LIBS_GPTD)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) $(RPATH) -o $@ $^ $(LIBS_SYSTEM)

$(BUILD)/libserver.a: $(call objects,$(SERVER_SRC) $(SERVER_FILES))
$(BUILD)/libengine.a: $(call objects,$(ENGINE_SRC))
$(BUILD)/libmodels.a: $(call objects,$(MODELS_SRC))
$(BUILD)/libtokenizer.a: $(call objects,$(TOKENIZER_SRC))
$(BUILD)/libkernels.a: $(call objects,$(KERNELS_SRC)) $(SIMD_OBJ)
$(BUILD)/lib%.a:
	@rm -f $@
	$(call say,AR,$@)
	$(Q)ar rcs $@ $^

$(BUILD)/obj/%.c.o: %.c VERSION
	@mkdir -p $(@D)
	$(call say,CC,$<)
	$(Q)$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/obj/%.cc.o: %.cc
	@mkdir -p $(@D)
	$(call say,CXX,$<)
	$(Q)$(CXX) $(CPPFLAGS) $(CXXFLAGS) -MMD -MP -c -o $@ $<
$(call objects,$(SERVER_FILES)): $(BUILD)/obj/%.o: %
	@mkdir -p $(@D)
	$(Q)ld -r -b binary -z noexecstack -o $@ $<
# The page's policy allows its style and its script by their hashes: of the files in the order in which page.c sends them.
PAGE_SCRIPT := $(patsubst %,server/page/%.js,dom markdown api settings turns page)
sha256_base64 = $$(printf '%b' "$$(cat $(1) | sha256sum | sed 's/ .*//; s/../\\x&/g')" | base64)
$(BUILD)/obj/server/page.c.o: server/page/style.css $(PAGE_SCRIPT)
$(BUILD)/obj/server/page.c.o: CPPFLAGS += -DGPTD_PAGE_STYLE_SHA256=\"$(call sha256_base64,server/page/style.css)\" \
  -DGPTD_PAGE_SCRIPT_SHA256=\"$(call sha256_base64,$(PAGE_SCRIPT))\"
define isa_rule
$(BUILD)/obj/kernels/cpu/simd/%.$(1).o: kernels/cpu/simd/%.c
	@mkdir -p $$(@D)
	$$(call say,CC,$$<)
	$$(Q)$$(CC) $$(CPPFLAGS) $$(CFLAGS) -O3 $(ISA_FLAGS_$(1)) -DISA=$(1) -MMD -MP -c -o $$@ $$<
endef
$(foreach isa,$(ISAS),$(eval $(call isa_rule,$(isa))))

# ---- serving ----

TRY = {"model": "$(notdir $(patsubst %/,%,$(MODEL)))", "prompt": "Once upon a time", "max_tokens": 200, "stream": true}

# What a newcomer types: installs what is missing, builds, serves $(MODEL).
run:
	@./scripts/setup.sh run
	@$(MAKE) --no-print-directory -j$$(nproc) $(BUILD)/gptd $(if $(NVCC),$(if $(wildcard /dev/nvidiactl),$(CUDA_LIB)))
	@printf '\nTry it from another terminal:\n\n  curl -N http://%s:%s/v1/completions -H "%s" \\\n    -d %s\n\n' \
	  '$(HOST)' '$(PORT)' 'Content-Type: application/json' "'"'$(TRY)'"'"
	@exec $(BUILD)/gptd --model $(MODEL) --host $(HOST) --port $(PORT)

# ---- tests: one Check suite per tests/test_*.c; suites of the engine run on tests/fake_model.c ----

TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
FAKE_MODEL_TESTS := $(filter $(BUILD)/tests/test_engine% $(BUILD)/tests/test_scheduler%,$(TESTS))
$(FAKE_MODEL_TESTS): $(call objects,tests/fake_model.c)
$(BUILD)/tests/test_model: $(call objects,tests/model_rig.c tests/model_vectors.c)
$(BUILD)/tests/test_%: $(BUILD)/obj/tests/test_%.c.o $(LIBS_GPTD)
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $(filter %.o,$^) $(LIBS_GPTD) $(LIBS_SYSTEM) $(shell pkg-config --libs check)

# A CUDA backend without a GPU, that fails as told.
FAULTY := $(BUILD)/tests/faulty/libgptd_cuda.so
$(FAULTY): $(BUILD)/obj/pic/tests/e2e/faulty_backend.c.o $(BUILD)/obj/pic/kernels/error.c.o
	@mkdir -p $(@D)
	$(Q)$(CC) $(LDFLAGS) -shared -o $@ $^
$(BUILD)/tests/test_backend: $(FAULTY)

# Everything a change must pass. Each step can be run alone once `scripts/setup.sh check` has been.
.PHONY: tests check-all check-unit check-asan check-tsan check-fuzz check-e2e check-convert check-dist lint
.PHONY: check-tokenizer check-jinja check-docker
check:
	@./scripts/setup.sh check
	@$(MAKE) --no-print-directory check-all
check-all:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory -j$$(nproc) all tests
	@$(MAKE) --no-print-directory check-unit
	@$(MAKE) --no-print-directory check-tokenizer
	@$(MAKE) --no-print-directory check-jinja
	@$(MAKE) --no-print-directory check-asan
	@$(MAKE) --no-print-directory check-tsan
	@$(MAKE) --no-print-directory check-fuzz
	@$(MAKE) --no-print-directory check-e2e
	@$(MAKE) --no-print-directory check-dist
	@$(MAKE) --no-print-directory check-docker
	@$(MAKE) --no-print-directory check-convert

lint:
	@python3 scripts/lint.py

tests: $(TESTS) $(FAULTY)
check-unit: $(TESTS)
	@set -e; for t in $(TESTS); do $$t; done

# tokenizer.json against Hugging Face's own library, on a megabyte and more of mixed text for each kind.
$(BUILD)/tests/tokenizer/encode: $(BUILD)/obj/tests/tokenizer/encode.c.o $(BUILD)/libtokenizer.a
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LIBS_SYSTEM)
check-tokenizer: $(BUILD)/tests/tokenizer/encode
	@build/venv/bin/python tests/tokenizer/compare.py $< --megabytes 0.2

# Templates against Python's jinja2.
$(BUILD)/tests/jinja/render: $(BUILD)/obj/tests/jinja/render.c.o $(BUILD)/libtokenizer.a
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LIBS_SYSTEM)
check-jinja: $(BUILD)/tests/jinja/render
	@build/venv/bin/python tests/jinja/compare.py --renderer $< --random 200

# Address and undefined-behaviour sanitizers over every suite and the running server.
check-asan:
	@$(MAKE) --no-print-directory -j$$(nproc) BUILD=build/asan SAN=address all tests
	@$(MAKE) --no-print-directory BUILD=build/asan SAN=address check-unit
	@build/venv/bin/python tests/e2e/run.py --server build/asan/gptd --quick

# Thread sanitizer over what has threads.
THREADED_TESTS = $(addprefix $(BUILD)/tests/test_,\
  thread_pool load engine engine_life engine_requests listener notifier workers log api_keys tokenizer admission)
check-tsan:
	@$(MAKE) --no-print-directory -j$$(nproc) BUILD=build/tsan SAN=thread all threaded-tests
	@$(MAKE) --no-print-directory BUILD=build/tsan SAN=thread check-threaded
	@build/venv/bin/python tests/e2e/run.py --server build/tsan/gptd --quick \
	  Sameness Crowd SlowAndGone End Framing KeyFile Passed QueueTimeout
.PHONY: check-threaded threaded-tests
threaded-tests: $(THREADED_TESTS)
check-threaded: $(THREADED_TESTS)
	@set -e; for t in $^; do $$t; done

# Each fuzz target for FUZZ_SECONDS, with clang's libFuzzer, on from what earlier runs have found (corpus.tar.gz).
FUZZ_SECONDS ?= 7
FUZZERS := $(patsubst tests/fuzz/%.c,$(BUILD)/tests/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))
.PHONY: check-fuzz fuzz-targets fuzz-corpus
check-fuzz:
	@$(MAKE) --no-print-directory -j$$(nproc) BUILD=build/fuzz SAN=fuzzer CC=clang CXX=clang++ fuzz-targets
	@mkdir -p build/fuzz/corpus; tar -xzf tests/fuzz/corpus.tar.gz -C build/fuzz/corpus
	@set -e; for t in $(notdir $(FUZZERS)); do mkdir -p build/fuzz/corpus/$$t; \
	  build/fuzz/tests/fuzz/$$t -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 -print_final_stats=1 \
	    -artifact_prefix=build/fuzz/ build/fuzz/corpus/$$t $$(ls -d tests/fuzz/corpus/$$t 2>/dev/null) \
	    >build/fuzz/$$t.log 2>&1 || { tail -n 60 build/fuzz/$$t.log; exit 1; }; \
	  echo "$$t: $$(awk '/number_of_executed_units/ {print $$2}' build/fuzz/$$t.log) inputs, nothing found"; done
# After a long check-fuzz: what it has found becomes what later ones begin with, without what adds nothing.
fuzz-corpus:
	@set -e; rm -rf build/fuzz/merged; for t in $(notdir $(FUZZERS)); do mkdir -p build/fuzz/merged/$$t; \
	  build/fuzz/tests/fuzz/$$t -merge=1 build/fuzz/merged/$$t build/fuzz/corpus/$$t >build/fuzz/$$t.merge.log 2>&1; done
	@tar --sort=name --owner=0 --group=0 --mtime=@0 -C build/fuzz/merged -c . | gzip -9n >tests/fuzz/corpus.tar.gz
fuzz-targets: $(FUZZERS)
# They read files and requests: no engine, no kernels.
LIBS_FUZZED := $(addprefix $(BUILD)/lib,server.a models.a tokenizer.a) $(call objects,kernels/error.c kernels/dtype.c)
$(BUILD)/tests/fuzz/%: $(BUILD)/obj/tests/fuzz/%.c.o $(LIBS_FUZZED)
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -fsanitize=fuzzer -o $@ $^ $(LIBS_SYSTEM)

# The running server: raw sockets, curl, the official OpenAI client, LangChain, requests made of /openapi.json.
check-e2e: $(BUILD)/gptd $(FAULTY)
	@build/venv/bin/python tests/e2e/run.py --server $(BUILD)/gptd

# Clients with much of their own (scripts/setup.sh clients installs 1.3 GB): litellm, lm-evaluation-harness, Gradio.
.PHONY: check-clients
check-clients: $(BUILD)/gptd
	@./scripts/setup.sh clients
	@build/clients/bin/python tests/e2e/run.py --server $(BUILD)/gptd LiteLLM LmEval Gradio

# The converter of state_dicts is Python with PyTorch, which nothing else here needs.
check-convert:
	@if python3 -c 'import torch, safetensors, transformers' 2>/dev/null; then python3 tests/test_convert.py; \
	  else echo "check-convert: skipped: python3 lacks torch, safetensors or transformers"; fi

# ---- on a GPU machine: tests and benchmarks that are carried there ----

GPU_TESTS := $(patsubst tests/gpu/%.c,$(BUILD)/gpu/%,$(wildcard tests/gpu/test_*.c tests/gpu/bench_*.c))
$(BUILD)/gpu/%: $(BUILD)/obj/tests/gpu/%.c.o $(call objects,tests/model_rig.c tests/model_vectors.c) $(LIBS_GPTD)
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ -Wl,-Bstatic -lcheck -lsubunit -Wl,-Bdynamic -lcjson -lrt -lm -ldl

# What the driver loads into the server to trace it (make bench-gpu): needs CUPTI, which comes with the toolkit.
GPU_TRACE := $(BUILD)/gpu/libgptd_trace.so
CUDA_HOME := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
$(GPU_TRACE): tests/gpu/trace.c
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CC) $(CPPFLAGS) -std=c11 $(OPT) $(WARN) -fPIC -shared -isystem $(CUDA_HOME)/include -o $@ $< \
	  -L$(CUDA_HOME)/lib64 -lcupti

# What a bare GPU machine lacks, in $(BUILD)/gpu: programs, tests and shared libraries, stripped; 40 MiB at most.
.PHONY: gpu-tests gpu-bundle check-gpu bench-gpu
gpu-tests: $(GPU_TESTS) $(GPU_TRACE)
gpu-bundle: $(BUILD)/gptd $(CUDA_LIB) $(GPU_TESTS) $(GPU_TRACE)
	@scripts/gpu_bundle.sh $(BUILD)
# On that machine, in a copy of the working tree with the bundle.
check-gpu:
	@scripts/check_gpu.sh $(BUILD)/gpu
bench-gpu:
	@python3 scripts/bench_gpu.py --bundle $(BUILD)/gpu

# ---- benchmarks ----

.PHONY: bench
bench: $(BUILD)/gptd $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/bench/bench_*.c))
	@python3 tests/bench/run.py --build $(BUILD)
BENCH_OBJ := $(call objects,$(filter-out tests/bench/bench_%,$(wildcard tests/bench/*.c)))
$(BUILD)/tests/bench/%: $(BUILD)/obj/tests/bench/%.c.o $(BENCH_OBJ) $(LIBS_GPTD)
	@mkdir -p $(@D)
	$(call say,LINK,$@)
	$(Q)$(CXX) $(LDFLAGS) -o $@ $^ $(LIBS_SYSTEM)

# ---- the tarball: what runs on any Linux of this machine's kind with glibc 2.36 or later ----

DIST := $(BUILD)/gptd-$(VERSION)-linux-$(MACHINE).tar.gz
.PHONY: dist
dist: $(DIST)
$(DIST): $(BUILD)/gptd $(if $(NVCC),$(CUDA_LIB)) README.md LICENSE THIRD_PARTY.md $(wildcard models/demo/*) scripts/dist.sh
	@scripts/dist.sh $@ $(BUILD)/gptd $(if $(NVCC),$(CUDA_LIB))
check-dist: $(DIST)
	@scripts/check_dist.sh $<

# The Dockerfile's image, built in a fresh Debian and run, without Docker. What is compiled already is not compiled again there:
# scripts/check_docker.py alone begins with nothing.
check-docker:
	@python3 scripts/check_docker.py --compiled

clean:
	rm -rf build

.SECONDARY:
-include $(shell find $(BUILD)/obj -name '*.d' 2>/dev/null)
