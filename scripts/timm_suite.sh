#!/usr/bin/env bash
# Run timm's own model tests on our models: scripts/timm_suite.sh [PATTERN ...] [-- pytest options].
# A pattern selects models by name, as in a shell; the default is all of our models. The tests come from the source
# distribution of the installed timm, which pip fetches into TIMM_SOURCE (by default a temporary folder).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
patterns=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    patterns+=("$1")
    shift
done
[ $# -eq 0 ] || shift

version=$(python -c 'import timm; print(timm.__version__)')
folder=${TIMM_SOURCE:-${TMPDIR:-/tmp}/timm-source-$version}
tests=$folder/timm-$version/tests
if [ ! -f "$tests/test_models.py" ]; then
    mkdir -p "$folder"
    draft=$(mktemp -d "$folder/draft.XXXXXX")
    trap 'rm -rf "$draft"' EXIT
    if ! pip download --quiet --no-deps --no-binary timm -d "$draft" "timm==$version"; then
        echo "timm_suite: the source distribution of timm $version, which has timm's tests, could not be fetched:" \
            "no test was run. Unpack it to $folder/timm-$version, or set TIMM_SOURCE to its parent folder." >&2
        exit 1
    fi
    tar -xzf "$draft/timm-$version.tar.gz" -C "$draft"
    # Test the installed timm, not the sources next to the tests.
    rm -rf "$draft/timm-$version/timm" "$folder/timm-$version"
    mv "$draft/timm-$version" "$folder/"
    rm -rf "$draft"
    trap - EXIT
fi
cd "$folder/timm-$version"
export VIM_TIMM_SUITE=${patterns[*]:-vim_*} PYTHONPATH="$root/tests/timm_suite:$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -m pytest -q -o addopts="" -p vim_models_only tests/test_models.py "$@"
