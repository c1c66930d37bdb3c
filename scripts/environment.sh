# Source this: makes .venv in the checkout, installs the package with what tests and demo need, and activates it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -m venv .venv
fi
. .venv/bin/activate
stamp=.venv/installed-from
want=$(cat pyproject.toml setup.py kernels/lowbit/cpu/*.{h,cpp} scripts/constraints.txt | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  # Compiling modules that nothing imports would take as long as all the rest.
  python -m pip install --quiet --no-compile --disable-pip-version-check --constraint scripts/constraints.txt --editable ".[test]"
  echo "$want" > "$stamp"
fi
