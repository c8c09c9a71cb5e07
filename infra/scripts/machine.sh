#!/bin/bash
# At each boot of a machine that is a platform by itself: installs the code from the bucket, once for each version of it,
# and starts the platform on loopback. Its log: journalctl -u google-startup-scripts
set -euo pipefail
BUCKET='@BUCKET@'
DIGEST='@DIGEST@'

id gdl_ray >/dev/null 2>&1 || useradd --create-home --shell /bin/bash gdl_ray
here=/home/gdl_ray
if [ "$(cat "$here/installed" 2>/dev/null)" != "$DIGEST" ]; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y python3-venv
  mkdir -p "$here/code"
  gcloud storage cp --recursive "$BUCKET/code" "$here/"
  chown -R gdl_ray: "$here"
  sudo -u gdl_ray python3 -m venv "$here/venv"
  wheel=$(echo "$here"/code/*.whl)
  pip=(sudo -u gdl_ray "$here/venv/bin/python" -m pip install --quiet --constraint "$here/code/constraints.txt")
  "${pip[@]}" "${wheel}[platform,gcp]"
  "${pip[@]}" --force-reinstall --no-deps "$wheel"
  echo "$DIGEST" >"$here/installed"
fi
settings=(GDL_RAY_HOME="$here/.gdl_ray" GDL_RAY_STORAGE="$BUCKET/runs" PATH="$here/venv/bin:$PATH")
cd "$here"
exec sudo -u gdl_ray env "${settings[@]}" "$here/venv/bin/python" -m infra up
