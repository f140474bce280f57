# WeightFS: everything a contributor runs. `make help` lists the targets.

SHELL := /bin/bash
CARGO ?= cargo
TARGET ?= $(CURDIR)/target
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
DENY_VERSION := 0.20.2
DENY := $(TARGET)/tools/bin/cargo-deny
CARGO_DEB_VERSION := 3.7.0
CARGO_DEB := $(TARGET)/tools/bin/cargo-deb
BOLERO_VERSION := 0.13.5
BOLERO := $(TARGET)/tools/bin/cargo-bolero
DRAGONFLY_VERSION := 1.5.10
DFDAEMON := $(TARGET)/dragonfly/bin/dfdaemon
# Seconds that `make fuzz` spends on each target.
DURATION ?= 300
# The same random inputs in each run of the tests: a failure is the change's. `make fuzz` looks for others.
export BOLERO_RANDOM_SEED ?= 1
# What is not in the program that `make build` makes, and is tested all the same.
OPTIONAL := --features weightfs-peers/endpoint-slices,weightfs/otlp
# A hung test must not hang a build machine: the whole run ends after this many seconds.
TEST_TIMEOUT ?= 1500
BENCH_TIMEOUT ?= $(if $(QUICK),300,3600)
# A quick benchmark asserts no time: it takes what the tests have built. Else the program is the one that is
# installed: together with the benchmark it would be built with the features of both.
BENCH_BUILD = $(if $(QUICK),$(CARGO) build --locked --workspace $(OPTIONAL) --bin weightfs --bin $(1),\
    packaging/release-build && packaging/release-build -p weightfs-tests --bin $(1))
BENCH_DIR := $(TARGET)/$(if $(QUICK),debug,dist)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Tests of the program as it is installed, not as it is debugged: they report times.
RELEASED := WEIGHTFS_BIN=$(TARGET)/dist/weightfs
# sudo resets PATH and HOME, and with them the toolchain.
AS_ROOT := $(if $(SUDO),$(SUDO) --preserve-env env PATH="$$PATH" HOME="$$HOME",)
export CARGO_TARGET_DIR := $(TARGET)

.PHONY: help build demo deb image reproducible test test-page test-install test-image test-dragonfly test-matrix left-out fuzz sanitize soak soak-store soak-contract soak-daemon bench bench-peers simulate check docs session deps test-deps clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: deps ## Build the program as it is installed: target/dist/weightfs
	packaging/release-build

deb: build $(CARGO_DEB) ## Build the Debian package: target/deb/weightfs_*.deb
	packaging/deb/build $(TARGET)/dist/weightfs $(CARGO_DEB)

image: build ## Build the container image: target/image, an OCI layout
	packaging/deps image
	$(AS_ROOT) packaging/debian-root $(TARGET)/debian-image ca-certificates
	$(AS_ROOT) packaging/image $(TARGET)/dist/weightfs $(TARGET)/debian-image $(TARGET)/image

reproducible: build ## Build it again, in another place: the same bytes?
	packaging/reproducible $(TARGET)/dist/weightfs $(TARGET)/reproducible

demo: deps ## A lazy mount and containers beside a pull (MODEL_DIR=...)
	packaging/deps demo
	packaging/containerd-package 1.7 $(TARGET)/containerd17 || true
	packaging/containerd-package 2.1 $(TARGET)/containerd21 || true
	$(CARGO) build --release --locked -p weightfs -p weightfs-tests --bins
	$(AS_ROOT) $(TARGET)/release/demo

test: test-deps ## All tests, as root: real registry, containerd, runc
	$(CARGO) build --workspace --locked --bins $(OPTIONAL)
	$(CARGO) test --workspace --locked --no-run $(OPTIONAL)
	$(CARGO) test --workspace --locked --doc $(OPTIONAL)
	set -o pipefail; $(AS_ROOT) timeout --kill-after=30 $(TEST_TIMEOUT) $(CARGO) test \
	    --workspace --locked $(OPTIONAL) --no-fail-fast --lib --bins --tests 2>&1 | tee $(TARGET)/test.log
	@awk '/^test result:/ { passed += $$4; failed += $$6 } \
	    END { print passed " passed, " failed " failed" }' $(TARGET)/test.log
	@$(MAKE) --no-print-directory left-out

test-matrix: test-deps ## The end-to-end tests of containerd 1.6, 1.7 and 2.1
	$(CARGO) build --locked -p weightfs --bins
	$(CARGO) test --locked -p weightfs-tests --test matrix --test model_image --test node \
	    --test doctor --test cri --no-run
	$(AS_ROOT) timeout --kill-after=30 $(TEST_TIMEOUT) $(CARGO) test --locked -p weightfs-tests \
	    --test matrix --test model_image --test node --test doctor --test cri -- --nocapture
	@$(MAKE) --no-print-directory left-out

# Where a run ends, and not in the midst of what tests print: which of them had nothing to run on.
left-out:
	@for version in 1.7 2.1; do [ -x $(TARGET)/containerd$${version/./}/usr/bin/containerd ] || \
	    echo "left out: the tests on containerd $$version, which can't be had here" >&2; done

test-page: test-deps ## The status page in a headless browser; its picture is target/tmp/page.png
	packaging/deps page
	$(CARGO) build --locked -p weightfs --bins
	$(AS_ROOT) timeout --kill-after=30 $(TEST_TIMEOUT) $(CARGO) test --locked -p weightfs-tests \
	    --test page -- --nocapture

test-install: deb ## The package on a bare Debian 12: install, mount, run, purge
	packaging/deps test
	packaging/deps install
	$(AS_ROOT) packaging/debian-root $(TARGET)/debian12 ca-certificates containerd runc
	$(CARGO) build --locked --workspace --bin install
	$(AS_ROOT) $(TARGET)/debug/install $(TARGET)/deb/weightfs_*.deb $(TARGET)/debian12

test-image: image ## The image's installer on a bare Debian 12, with and without systemd
	packaging/deps test
	packaging/deps install
	$(AS_ROOT) packaging/debian-root $(TARGET)/debian12 ca-certificates containerd runc
	$(CARGO) build --locked --workspace --bin install_node
	$(AS_ROOT) $(TARGET)/debug/install_node $(TARGET)/image:$(VERSION) $(TARGET)/debian12

test-dragonfly: $(DFDAEMON) ## Load models through two real dfdaemons of Dragonfly
	packaging/deps test
	$(CARGO) build --locked --workspace --bin weightfs --bin dragonfly
	$(AS_ROOT) timeout --kill-after=30 $(TEST_TIMEOUT) $(TARGET)/debug/dragonfly $(DFDAEMON)

fuzz: deps $(BOLERO) ## Fuzz every parser (DURATION=seconds for each, TARGETS=part of a name)
	PATH="$(TARGET)/tools/bin:$$PATH" packaging/fuzz $(DURATION) $(TARGETS)

sanitize: deps ## The store's tests under Miri and the sanitizers (SANITIZE=miri)
	packaging/sanitize $(or $(SANITIZE),miri address thread)

soak: soak-store soak-contract soak-daemon ## The long runs of the random tests and of the kills

soak-store: deps ## The store's random tests, a million operations (SEED=n)
	$(CARGO) test --locked -p weightfs-store --no-run
	$(AS_ROOT) env WEIGHTFS_MODEL_OPERATIONS=$(or $(OPERATIONS),1000000) \
	    $(if $(SEED),WEIGHTFS_MODEL_SEED=$(SEED)) WEIGHTFS_KILL_ROUNDS=200 \
	    WEIGHTFS_POWER_LOSSES=1000 $(CARGO) test --locked -p weightfs-store --lib --tests -- \
	    --nocapture power_loss random_operations whenever_it_is_killed

soak-contract: deps ## Random snapshot calls, restarts and kills against a model (CASES=n)
	$(CARGO) test --locked -p weightfs --test contract --no-run
	$(AS_ROOT) env WEIGHTFS_CONTRACT_CASES=$(or $(CASES),20000) \
	    WEIGHTFS_CONTRACT_KILLS=$(or $(KILLS),2000) \
	    $(CARGO) test --locked -p weightfs --test contract -- --nocapture random

soak-daemon: test-deps build ## Kill the daemon under load, pull and remove (ROUNDS=50 PULLS=200)
	$(CARGO) test --locked -p weightfs-tests --test takeover --test pulls --no-run
	$(AS_ROOT) env $(RELEASED) WEIGHTFS_ROUNDS=$(or $(ROUNDS),50) timeout --kill-after=30 \
	    $(TEST_TIMEOUT) $(CARGO) test --locked -p weightfs-tests --test takeover -- \
	    --nocapture kills
	$(AS_ROOT) env $(RELEASED) WEIGHTFS_PULLS=$(or $(PULLS),200) timeout --kill-after=30 \
	    $(TEST_TIMEOUT) $(CARGO) test --locked -p weightfs-tests --test pulls -- \
	    --nocapture removals

bench: test-deps ## Measure it beside a pull (QUICK=1, ROUNDS=n, LOADERS=all)
	if [ "$(LOADERS)" = all ]; then packaging/loaders-env $(TARGET)/loaders-env; fi
	$(call BENCH_BUILD,bench)
	$(AS_ROOT) timeout --kill-after=30 $(BENCH_TIMEOUT) $(BENCH_DIR)/bench

bench-peers: test-deps ## 16 nodes on shaped links load a model (QUICK=1, NODES= MIB= MBIT=)
	$(call BENCH_BUILD,bench-peers)
	$(AS_ROOT) timeout --kill-after=30 $(BENCH_TIMEOUT) $(BENCH_DIR)/bench-peers

simulate: deps ## Simulate many nodes that load one model (N=100,1000,3000 CHURN= SLOW= LATE=)
	$(CARGO) run --release --locked -p weightfs-swarm --example simulate -- \
	    --output $(TARGET)/bench $(if $(N),--nodes $(N)) $(if $(CHURN),--churn $(CHURN)) \
	    $(if $(SLOW),--slow $(SLOW)) $(if $(LATE),--late $(LATE))

check: deps $(DENY) ## Format, lints, documentation, licences and sources
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked $(OPTIONAL) -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --document-private-items
	$(DENY) --log-level warn check --hide-inclusion-graph licenses bans sources

session: deps ## Record the terminal session of the README: docs/session.svg
	packaging/deps demo
	$(CARGO) build --release --locked -p weightfs -p weightfs-tests --bin weightfs --bin session
	$(AS_ROOT) $(TARGET)/release/session docs/session.svg

docs: deps ## Write the pages that are made from the code
	WEIGHTFS_WRITE_DOCUMENTS=1 $(CARGO) test --locked -q -p weightfs --lib documents_

deps: ## Install what building needs (apt; nothing if all is there)
	packaging/deps build

test-deps: deps ## Install what the tests need (apt; Python packages in target/)
	packaging/deps test
	packaging/python-env $(TARGET)/python
	packaging/promtool $(TARGET)/promtool
	packaging/kubernetes-tools $(TARGET)/kubernetes
	packaging/containerd-package 1.7 $(TARGET)/containerd17 || true
	packaging/containerd-package 2.1 $(TARGET)/containerd21 || true

clean: ## Remove what was built
	$(CARGO) clean

$(DENY):
	$(CARGO) install --locked --version $(DENY_VERSION) --root $(TARGET)/tools \
	    --target-dir $(TARGET)/tools/build cargo-deny
	rm -rf $(TARGET)/tools/build

$(CARGO_DEB):
	$(CARGO) install --locked --version $(CARGO_DEB_VERSION) --root $(TARGET)/tools \
	    --target-dir $(TARGET)/tools/build cargo-deb
	rm -rf $(TARGET)/tools/build

$(BOLERO):
	$(CARGO) install --locked --version $(BOLERO_VERSION) --root $(TARGET)/tools \
	    --target-dir $(TARGET)/tools/build cargo-bolero
	rm -rf $(TARGET)/tools/build

# Some 660 crates and RocksDB: most of an hour on two cores, once.
$(DFDAEMON):
	packaging/deps dragonfly
	$(CARGO) install --locked --version $(DRAGONFLY_VERSION) --bin dfdaemon --root $(TARGET)/dragonfly \
	    --target-dir $(TARGET)/dragonfly/build dragonfly-client
	rm -rf $(TARGET)/dragonfly/build
