# The front door. `make` or `make help` lists what there is.
#
# Every target first makes .venv with the tested versions, once. PYTHON=/path/to/python uses that interpreter as it is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

EXP ?=
ARGS ?=
CKPT ?=
OFFICIAL ?=
EMA ?=
LABELS ?=
NUM ?=
SEED ?= 0
OUT ?=
STATS ?=
EXTRACTOR ?=
IMAGES ?=
IMAGE ?=
TEXT ?=
MASK ?=
SAVE ?=
DEVICES ?=
SPLIT ?= train
CFG ?=
METRIC ?=
FINAL ?=
GPU ?= h100
GPUS ?=
MFU ?=

ifdef PYTHON
  PY := $(PYTHON)
  READY :=
else
  PY := .venv/bin/python
  READY := .venv/.stamp
endif

# An argument is passed on only where a value was given.
opt = $(if $(strip $(2)),--$(1) "$(strip $(2))")
need_exp = $(if $(strip $(EXP)),,$(error EXP is missing: for example make $@ EXP=jit_digits; make help lists the experiments))

weights = --exp "$(strip $(EXP))" $(call opt,ckpt,$(CKPT)) $(call opt,official,$(OFFICIAL)) $(call opt,ema,$(EMA))
scoring = $(call opt,num,$(NUM)) $(call opt,stats,$(STATS)) $(call opt,extractor,$(EXTRACTOR)) $(call opt,devices,$(DEVICES)) $(call opt,out,$(OUT)) --seed "$(SEED)"

.PHONY: help setup train sample caption export eval sweep stats cache latents probe plan claims smoke test test-slow test-gpu kills lint bench tensorboard

help:  ## this text
	@echo "softtokens: image generation without a vector-quantised bottleneck"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22
	@echo
	@echo "  EXP       experiment, a file of experiments/: $$(cd experiments && ls *.yaml | sed 's/\.yaml//' | grep -vE '^(default|smoke)$$' | tr '\n' ' ')"
	@echo '  ARGS      LightningCLI overrides: ARGS="--trainer.max_steps=10 --model.init_args.net.depth=4"'
	@echo "  CKPT      last (newest run of EXP) or a path: resumes in train, loads elsewhere"
	@echo "  OFFICIAL  an official checkpoint (.pth or .safetensors): starts from it in train, loads elsewhere"
	@echo "  EMA       weights to sample or export: raw, or a decay such as 0.9999 (default: the first average)"
	@echo "  STATS     reference statistics (npz of make stats, ADM or JiT); EXTRACTOR inception, effnet_lite0, randconv, none"
	@echo "  PYTHON    an interpreter to use instead of .venv"

setup: $(READY)  ## make .venv with the tested versions (every other target does so too)
	@echo "ready: $(PY)"

.venv/.stamp: pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: python3 is $$(python3 --version 2>&1), 3.11 or newer is needed: give one with PYTHON=" >&2; exit 2; }
	@echo "installing into .venv (about 6 GB, some minutes, once) ..."
	@python3 -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[data,text,dev]"
	@touch $@

train: $(READY)  ## train EXP, e.g. make train EXP=jit_digits; CKPT= resumes, OFFICIAL= fine-tunes
	$(need_exp)@$(PY) -m experiments.main fit --exp "$(strip $(EXP))" $(call opt,ckpt,$(CKPT)) $(call opt,official,$(OFFICIAL)) $(ARGS)

sample: $(READY)  ## draw NUM images of EXP from CKPT or OFFICIAL into OUT: LABELS=0,1,2 or TEXT="red apple" NUM=64 SEED=0 OUT=out/; IMAGE=in.png MASK=mask.png draws the mask's white part anew
	$(need_exp)@$(PY) -m experiments.sample --exp "$(strip $(EXP))" $(call opt,ckpt,$(CKPT)) $(call opt,official,$(OFFICIAL)) $(call opt,ema,$(EMA)) $(call opt,labels,$(LABELS)) $(call opt,text,$(TEXT)) $(call opt,image,$(IMAGE)) $(call opt,mask,$(MASK)) --num "$(or $(strip $(NUM)),64)" --seed "$(SEED)" --out "$(or $(strip $(OUT)),out/)" $(ARGS)

caption: $(READY)  ## what EXP's CKPT says of a picture: IMAGE=apple.png
	$(need_exp)@$(PY) -m experiments.caption $(weights) --image "$(strip $(IMAGE))" $(call opt,text,$(TEXT)) $(ARGS)

export: $(READY)  ## write EXP's CKPT in the official layout (OUT=x.pth, all weights) or as safetensors (OUT=x.safetensors, EMA=)
	$(need_exp)@$(PY) -m experiments.export --exp "$(strip $(EXP))" $(call opt,ckpt,$(CKPT)) $(call opt,ema,$(EMA)) --out "$(or $(strip $(OUT)),out/)" $(ARGS)

eval: $(READY)  ## score EXP's CKPT or OFFICIAL (or IMAGES=folder): STATS=x.npz EXTRACTOR= NUM= DEVICES= SAVE=png/
	$(need_exp)@$(PY) -m experiments.evaluate $(weights) $(scoring) $(call opt,images,$(IMAGES)) $(call opt,save,$(SAVE)) $(ARGS)

sweep: $(READY)  ## score guidance scales and averages: CFG=1:4:0.5 EMA=0.9999,0.9996 NUM=1000, then the best with FINAL=50000
	$(need_exp)@$(PY) -m experiments.sweep $(weights) $(scoring) --cfg "$(CFG)" $(call opt,metric,$(METRIC)) $(call opt,final,$(FINAL)) $(ARGS)

stats: $(READY)  ## reference statistics of EXP's data: SPLIT=train EXTRACTOR=inception OUT=stats/x.npz
	$(need_exp)@$(PY) -m experiments.stats --exp "$(strip $(EXP))" --split "$(SPLIT)" $(call opt,extractor,$(EXTRACTOR)) $(call opt,devices,$(DEVICES)) $(call opt,out,$(OUT)) $(ARGS)

probe: $(READY)  ## linear probes of EXP's representations (CKPT or OFFICIAL), from at most NUM training images
	$(need_exp)@$(PY) -m experiments.probe $(weights) $(call opt,num,$(NUM)) --seed "$(SEED)" $(ARGS)

cache: $(READY)  ## latents of EXP's images, by its tokenizer: SPLIT=train OUT=folder DEVICES=8; goes on where it stopped
	$(need_exp)@$(PY) -m experiments.cache --exp "$(strip $(EXP))" --split "$(SPLIT)" $(call opt,devices,$(DEVICES)) $(call opt,out,$(OUT)) $(ARGS)

latents: $(READY)  ## latent_scale of EXP's trained tokenizer (CKPT or OFFICIAL), over NUM training images of its data
	$(need_exp)@$(PY) -m experiments.measure_latents $(weights) $(call opt,num,$(NUM)) --seed "$(SEED)" $(ARGS)

plan: $(READY)  ## parameters, memory, FLOPs and hours of EXP on GPU=h100 GPUS=8 MFU=0.4, before a GPU is paid for
	$(need_exp)@$(PY) -m experiments.plan --exp "$(strip $(EXP))" --gpu "$(GPU)" $(call opt,gpus,$(GPUS)) $(call opt,mfu,$(MFU)) $(ARGS)

claims: $(READY)  ## try every claim of the papers anew and write docs/claims.md: under three hours on 2 cores
	@$(PY) -m benchmarks.claims.jit_toy $(ARGS)
	@$(PY) -m benchmarks.claims.jit_prediction $(ARGS)
	@$(PY) -m benchmarks.claims.mar_loss $(ARGS)
	@$(PY) -m benchmarks.claims.mar_head $(ARGS)
	@$(PY) -m benchmarks.claims.givt_mixture $(ARGS)
	@$(PY) -m benchmarks.claims.givt_sampling $(ARGS)
	@$(PY) -m benchmarks.claims.jetformer_flow $(ARGS)
	@$(PY) -m benchmarks.claims.jetformer_recipe $(ARGS)
	@$(PY) -m benchmarks.claims.rar_orders $(ARGS)
	@$(PY) -m benchmarks.claims.dart_history $(ARGS)

smoke: $(READY)  ## EXP shrunken, on synthetic data and CPU: train, resume, sample in seconds
	$(need_exp)@$(PY) -m tests.smoke "$(strip $(EXP))"

test: $(READY)  ## the test suite, some minutes on 2 cores; GOLDEN_DIR= points it at other golden cases
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)  ## the tests that take minutes
	@$(PY) -m pytest -m slow $(ARGS)

kills: $(READY)  ## kill shrunken offline recipes at random moments, resume, compare bit for bit: ARGS="--kills 200 --seed 0"
	@$(PY) -m benchmarks.kills $(ARGS)

test-gpu: $(READY)  ## the tests that need a CUDA device
	@$(PY) -m pytest -m gpu $(ARGS)

lint: $(READY)  ## ruff: style and formatting
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

bench: $(READY)  ## time EXP's training step and sampler against the plain path; EXP=data: the loaders
	$(need_exp)@$(PY) -m $(if $(filter data,$(EXP)),benchmarks.data,benchmarks.bench --exp "$(strip $(EXP))") $(ARGS)

tensorboard: $(READY)  ## watch the runs on port 6006
	@$(PY) -m tensorboard.main --logdir runs
