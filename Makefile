# What one can do here. `make` alone lists it.

DOCUMENT ?=
QUESTION ?=
FLAGS ?=
export DOCUMENT QUESTION

.DEFAULT_GOAL := help
.PHONY: demo test profiles bench bench-peers fmt lint docs clean help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Compare cache policies on a real model and a real document (DOCUMENT=file QUESTION="...")
	@scripts/demo.sh

test: ## Everything that must pass: format, lints, tests, GPU conformance, docs, host and program
	@scripts/test.sh

profiles: ## Learn of the demo's model what kvzap, locret, duo, compresskv and others go by (FLAGS="--samples 8")
	@scripts/profiles.sh $(FLAGS)

bench: ## Time the kernels and the decode step on this machine
	cargo bench --features testing

bench-peers: ## Attention beside ggml's, candle's and the machine's limits, in one run (FLAGS="--quick")
	@scripts/bench-peers.sh $(FLAGS)

fmt: ## Format all Rust code
	cargo fmt --all
	rustfmt --edition 2024 src/policy/score/*.rs src/policy/allocate/*.rs src/policy/whole/*.rs src/reduce/*.rs
	cargo fmt --manifest-path benches/peers/Cargo.toml

lint: ## Format check and clippy, without running anything
	@scripts/test.sh fmt clippy

docs: ## Build the API documentation into target/doc
	@scripts/test.sh docs

clean: ## Remove what was built (models stay)
	cargo clean
