# `just` lists what there is; `just ci` is what CI runs.
default:
    @just --list

fmt:
    cargo fmt --all

lint:
    cargo clippy --workspace --all-targets -- -D warnings

test:
    cargo test --workspace

# The tests with one instruction set forced: scalar, avx2, avx512 or neon.
test-isa isa:
    MAMBA_ISA={{isa}} MAMBA_REQUIRE_ISA={{isa}} cargo test --workspace

# The tests on a GPU; fails if there is none.
test-cuda:
    bash .ci/test-cuda

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --open

bench name:
    cargo bench -p mamba-benches --bench {{name}}

ci:
    bash .ci/run
