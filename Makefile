# Thin targets; the work is in Rust and in the short scripts of e2e/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
CARGO_BUILD_JOBS ?= 2
export CARGO_BUILD_JOBS
SECONDS_EACH ?= 15
TARGET := x86_64-unknown-linux-gnu
IMAGES := target/images
# The packages that need nothing but this machine.
CRATES := nix-csi-store nix-csi-proto nix-csi-certs nix-csi-webhook nix-csi-node

.PHONY: help
help: ## What there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | column -t -s "$$(printf '\t')"

.PHONY: setup
setup: ## Install what is missing (Debian, root), or say what it is
	@e2e/setup.sh

.PHONY: check
check: setup-build ## Fast checks: format, clippy, each crate alone, documentation, licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	for crate in $(CRATES); do cargo check --quiet --locked -p $$crate || exit 1; done
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --locked --quiet
	e2e/deny.sh

.PHONY: setup-build
setup-build:
	@e2e/setup.sh build

.PHONY: unit
unit: setup-build ## Unit, in-process and property tests
	cargo test --locked
	cargo test --locked -p nix-csi-bench

.PHONY: fuzz
fuzz: setup-build ## The parsers of what comes from outside, fed for a bounded time (SECONDS_EACH=15)
	csi-node/nix-store/fuzz/run.sh $(SECONDS_EACH)

.PHONY: fixtures
fixtures: setup ## The package fixtures: closures by real Nix, in signed caches
	@e2e/fixtures/build.sh

.PHONY: kernel
kernel: setup ## Tests against the real kernel, real Nix and csi-sanity (root)
	e2e/kernel-tests.sh

.PHONY: images
images: setup-build ## Static binaries in empty images, as OCI archives in target/images
	RUSTFLAGS="-C target-feature=+crt-static" \
	  cargo build --release --locked --target $(TARGET) -p nix-csi-node -p nix-csi-webhook
	for program in csi-node:nix-csi-node webhook:nix-csi-webhook; do \
	  name=$${program#*:}; mkdir -p $(IMAGES)/$$name && \
	  cp target/$(TARGET)/release/$$name $(IMAGES)/$$name/ && \
	  e2e/images/archive.sh $${program%%:*}/Containerfile $(IMAGES)/$$name localhost/$$name:dev $(IMAGES)/$$name.tar || exit 1; \
	done

.PHONY: cluster-tests
cluster-tests: setup images ## Tests on a real one-node Kubernetes, started for them
	e2e/cluster-tests.sh

.PHONY: test
test: setup ## Everything
	$(MAKE) check
	$(MAKE) unit
	$(MAKE) fuzz
	$(MAKE) kernel
	$(MAKE) cluster-tests

.PHONY: bench
bench: setup ## Fetches, publishes, views and reviews beside peers and limits, in target/bench.json (root; ARGS=--rounds 3)
	e2e/bench.sh $(ARGS)

.PHONY: bench-headline
bench-headline: setup images ## Ten sets of packages as images and as volumes, on a cluster of its own; adds to target/bench.json (root)
	e2e/bench-headline.sh

.PHONY: demo
demo: setup images ## From nothing to a Deployment that runs a Nix package, shown step by step
	e2e/demo.sh

.PHONY: uninstall
uninstall: ## Take nix-csi off the cluster of the current kubectl context; refuses while pods use it (ARGS=--delete-node-data)
	manifests/uninstall.sh $(ARGS)
