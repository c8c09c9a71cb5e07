#!/bin/bash
# Puts on this node what its services run: install.sh head|worker EXTRAS DIGEST installs the wheel in ~/gdl_ray/code whose
# sha256 sum begins with DIGEST, with these extras, once. With GDL_RAY_IMAGE, it pulls that container image instead.
set -euo pipefail
role=$1 extras=$2 digest=$3
here=$HOME/gdl_ray

if [ -n "${GDL_RAY_IMAGE:-}" ]; then
  sudo docker pull --quiet "$GDL_RAY_IMAGE"
  exit
fi
python=$here/venv/bin/python
# Ubuntu's Python without its venv package makes one that has no pip.
if ! "$python" -m pip --version >/dev/null 2>&1; then
  python3 -m venv --clear "$here/venv" || {
    for _ in {1..20}; do  # at boot, Ubuntu's own updates hold apt's locks
      sudo apt-get -qq update && break
      sleep 15
    done
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3-venv
    python3 -m venv --clear "$here/venv"
  }
fi
if [ "$(cat "$here/installed" 2>/dev/null)" != "$digest" ]; then
  pip=("$python" -m pip install --quiet --disable-pip-version-check --constraint "$here/code/constraints.txt")
  # The head has no GPU: PyTorch without CUDA is a tenth of the download. What it needs comes with the rest, from PyPI.
  [ "$role" = worker ] || "${pip[@]}" --no-deps --index-url https://download.pytorch.org/whl/cpu torch
  # Wheels of earlier versions may lie beside it.
  wheel=$(sha256sum "$here"/code/*.whl | sed -n "s/^${digest}[0-9a-f]*  //p")
  [ -n "$wheel" ] || { echo "no wheel in $here/code has the sum $digest" >&2; exit 1; }
  "${pip[@]}" "${wheel}[$extras]"
  "${pip[@]}" --force-reinstall --no-deps "$wheel"  # the same version may be other code
  echo "$digest" >"$here/installed"
fi
# For people who log in, and for `ray exec`.
sudo ln -sf "$here/venv/bin/ray" /usr/local/bin/ray
