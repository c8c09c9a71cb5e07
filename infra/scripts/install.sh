#!/bin/bash
# Puts on this node what its services run: install.sh head|worker EXTRAS DIGEST installs the wheel in ~/gdl_ray/code with
# these extras, once for each digest of it. With GDL_RAY_IMAGE, it pulls that container image instead.
set -euo pipefail
role=$1 extras=$2 digest=$3
here=$HOME/gdl_ray

if [ -n "${GDL_RAY_IMAGE:-}" ]; then
  sudo docker pull --quiet "$GDL_RAY_IMAGE"
  exit
fi
python=$here/venv/bin/python
if ! [ -x "$python" ]; then
  python3 -m venv "$here/venv" || {
    sudo apt-get -qq update
    sudo DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3-venv
    python3 -m venv --clear "$here/venv"
  }
fi
if [ "$(cat "$here/installed" 2>/dev/null)" != "$digest" ]; then
  pip=("$python" -m pip install --quiet --disable-pip-version-check --constraint "$here/code/constraints.txt")
  # The head has no GPU: PyTorch without CUDA is a tenth of the download.
  [ "$role" = worker ] || "${pip[@]}" --index-url https://download.pytorch.org/whl/cpu torch
  wheel=$(echo "$here"/code/*.whl)
  "${pip[@]}" "${wheel}[$extras]"
  "${pip[@]}" --force-reinstall --no-deps "$wheel"  # the same version may be other code
  echo "$digest" >"$here/installed"
fi
# For people who log in, and for `ray exec`.
sudo ln -sf "$here/venv/bin/ray" /usr/local/bin/ray
