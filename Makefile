# The two commands of a new user, and what developers and operators run beside them.

.PHONY: demo demo-product test live soak bench jobs-update setup clean

demo: setup
	@.venv/bin/python -m pkgci.demo

# the same of a package of the reference product, tested in that product: minutes more, the first time
demo-product: setup
	@PKGCI_CONFIG=etc/reference .venv/bin/python -m pkgci.demo product

test:
	@scripts/setup.sh test
	@.venv/bin/pkgci prepare
	@.venv/bin/tox

# Gerrit, Zuul and the server of Jenkins' line with two packages, for a person to try
live:
	@scripts/setup.sh test
	@.venv/bin/tox -q -e live --notest
	@PYTHONPATH=tests:tests/live .tox/live/bin/python tests/live/stack.py

# what the tests do a few times, a hundred times: hours
soak:
	@scripts/setup.sh test
	@PKGCI_KILLS=100 .venv/bin/tox -e integration -- -s -n 0 -k 'random_kills or fault_point'
	@PKGCI_PUBLICATIONS=200 .venv/bin/tox -e integration -- -s -n 0 -k readers_never

bench:
	@scripts/setup.sh bench
	@PYTHONPATH=tests .venv/bin/python tests/bench/run.py

# the job definitions into the Jenkins that PKGCI_CONFIG names; it shows the differences first, and asks
jobs-update: setup
	@.venv/bin/pkgci jobs-update

setup:
	@scripts/setup.sh

clean:
	rm -rf .venv .tox scripts/*.egg-info
