#!/bin/bash
# Copies a data set to this node and checks that every file arrived with its full size: stage.bash FROM TO MANIFEST
set -uo pipefail
from=$1 to=$2 manifest=$3

list_files() { find -L . -type f -printf '%s %P\n' | LC_ALL=C sort; }

fail() {
    echo "error: $(hostname): $*" >&2
    rm -rf -- "$to"
    exit 1
}

# What an earlier start left is not whole, and nobody else may have made the folder.
rm -rf -- "$to"
{ mkdir -p -- "$(dirname -- "$to")" && mkdir -m 700 -- "$to"; } || fail "$to cannot be created"
cp -RL -- "$from/." "$to" || fail "$from cannot be copied to $to"
cd -- "$to" || fail "$to is gone"
list_files | cmp --silent -- - "$manifest" || fail "the copy of $from in $to is not complete"
