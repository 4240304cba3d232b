#!/usr/bin/env bash
# Run timm's own model tests on our models: scripts/timm_suite.sh [pattern of names] [pytest options].
# The tests come with the source distribution of the installed timm, which pip fetches from the package index.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
pattern=${1:-vim_*}
shift || true

version=$(python -c 'import timm; print(timm.__version__)')
folder=${TIMM_SOURCE:-${TMPDIR:-/tmp}/timm-source-$version}
if [ ! -f "$folder/timm-$version/tests/test_models.py" ]; then
    mkdir -p "$folder"
    pip download --quiet --no-deps --no-binary timm -d "$folder" "timm==$version"
    tar -xzf "$folder/timm-$version.tar.gz" -C "$folder"
fi
cd "$folder/timm-$version"
# The installed timm is tested against, not the sources beside the tests.
rm -rf timm
export VIM_TIMM_SUITE=$pattern PYTHONPATH="$root/tests/timm_suite:$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m pytest -q -o addopts="" -p vim_models_only tests/test_models.py "$@"
