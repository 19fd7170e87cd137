# gptd: `make run` serves the demo model, `make check` runs every test; both install what is missing first.
# `make` alone builds build/gptd. Variables: PORT, HOST, MODEL (make run); BUILD; SAN=address|thread.

.DEFAULT_GOAL := all
.SUFFIXES:
.DELETE_ON_ERROR:

BUILD ?= build
SAN ?=
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
LIBS_SYSTEM = $(shell pkg-config --libs libmicrohttpd sentencepiece) -lcjson -lstdc++ -lm -ldl

.PHONY: all run check clean
all: $(BUILD)/gptd

$(BUILD)/gptd: $(call objects,server/main.c) $(LIBS_GPTD)
	$(CXX) $(LDFLAGS) -o $@ $^ $(LIBS_SYSTEM)

$(BUILD)/libserver.a: $(call objects,$(SERVER_SRC) $(wildcard server/openapi.json))
$(BUILD)/libengine.a: $(call objects,$(ENGINE_SRC))
$(BUILD)/libmodels.a: $(call objects,$(MODELS_SRC))
$(BUILD)/libtokenizer.a: $(call objects,$(TOKENIZER_SRC))
$(BUILD)/libkernels.a: $(call objects,$(KERNELS_SRC)) $(SIMD_OBJ)
$(BUILD)/lib%.a:
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/obj/%.c.o: %.c VERSION
	@mkdir -p $(@D)
	$(CC) $(CPPFLAGS) $(CFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/obj/%.cc.o: %.cc
	@mkdir -p $(@D)
	$(CXX) $(CPPFLAGS) $(CXXFLAGS) -MMD -MP -c -o $@ $<
$(BUILD)/obj/%.json.o: %.json
	@mkdir -p $(@D)
	ld -r -b binary -z noexecstack -o $@ $<
define isa_rule
$(BUILD)/obj/kernels/cpu/simd/%.$(1).o: kernels/cpu/simd/%.c
	@mkdir -p $$(@D)
	$$(CC) $$(CPPFLAGS) $$(CFLAGS) -O3 $(ISA_FLAGS_$(1)) -DISA=$(1) -MMD -MP -c -o $$@ $$<
endef
$(foreach isa,$(ISAS),$(eval $(call isa_rule,$(isa))))

# ---- tests: one Check suite per tests/test_*.c; suites of the engine run on tests/fake_model.c ----

TESTS := $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
FAKE_MODEL_TESTS := $(filter $(BUILD)/tests/test_engine% $(BUILD)/tests/test_scheduler%,$(TESTS))
$(FAKE_MODEL_TESTS): $(call objects,tests/fake_model.c)
$(BUILD)/tests/test_%: $(BUILD)/obj/tests/test_%.c.o $(LIBS_GPTD)
	@mkdir -p $(@D)
	$(CXX) $(LDFLAGS) -o $@ $(filter %.o,$^) $(LIBS_GPTD) $(LIBS_SYSTEM) $(shell pkg-config --libs check)

.PHONY: tests check-unit
tests: $(TESTS)
check-unit: $(TESTS)
	@set -e; for t in $(TESTS); do $$t; done

bench: $(BUILD)/bench
.PHONY: bench
$(BUILD)/tests/bench/%: $(BUILD)/obj/tests/bench/%.c.o $(LIBS_GPTD)
	@mkdir -p $(@D)
	$(CXX) $(LDFLAGS) -o $@ $^ $(LIBS_SYSTEM)

clean:
	rm -rf build

.SECONDARY:
-include $(shell find $(BUILD)/obj -name '*.d' 2>/dev/null)
