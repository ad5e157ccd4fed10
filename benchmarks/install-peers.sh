#!/usr/bin/env bash
# The other libraries that the benchmarks and slow tests compare with, in an environment of their own: .venv-peers.
set -euo pipefail
cd "$(dirname "$0")/.."
mark=.venv-peers/.ready
if [ -f "$mark" ] && [ "$mark" -nt benchmarks/requirements-peers.txt ]; then exit 0; fi
python3 -m venv .venv-peers
# torch first, so that nothing that follows brings another build of it
.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
.venv-peers/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements-peers.txt
touch "$mark"
