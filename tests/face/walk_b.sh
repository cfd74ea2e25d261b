#!/usr/bin/env bash
# The second walk of a first-time user: clone, quickstart, report, the README's own loop.
#   tests/face/walk_b.sh FOLDER [HOST] [STEPS]
# FOLDER is where the clone goes. The environment is made from its lock, unless ENVIRONMENTS names a
# checkout whose environments are to be used again.
set -euo pipefail
folder=$1 host=${2:-openrlhf} steps=${3:-30}
source=$(cd "$(dirname "$0")/../.." && pwd)

git clone --quiet "$source" "$folder"
cd "$folder"
if [[ -n ${ENVIRONMENTS:-} ]]; then
    cp -al "$ENVIRONMENTS/.venv-$host" .
    ".venv-$host/bin/python" -m pip install --quiet --no-deps --editable .
    touch ".venv-$host/.lock" ".venv-$host/.klplug"
fi
make quickstart HOST="$host" STEPS="$steps"
".venv-$host/bin/klplug" report runs/quickstart* --out report
test -s report/report.html

# The README's loop, as it stands there.
sed -n '/^```python$/,/^```$/p' README.md | sed '/^```/d' > loop.py
echo 'assert distance < 0.05, distance' >> loop.py
".venv-$host/bin/python" loop.py
echo "walk b: done"
