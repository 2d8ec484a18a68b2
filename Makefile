# The two commands of a new user, and what developers and operators run beside them.

.PHONY: demo test bench setup clean

demo: setup
	@.venv/bin/python -m pkgci.demo

test:
	@scripts/setup.sh test
	@.venv/bin/pkgci prepare
	@.venv/bin/tox

bench: setup
	@PYTHONPATH=tests .venv/bin/python tests/bench/bench_compile.py

setup:
	@scripts/setup.sh

clean:
	rm -rf .venv .tox scripts/*.egg-info
