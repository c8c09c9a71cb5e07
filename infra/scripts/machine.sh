#!/bin/bash
# At each boot of a machine that is a platform by itself: installs the code from the bucket, once for each version of it,
# and starts the platform on loopback. Its log: journalctl -u google-startup-scripts
set -euo pipefail
BUCKET='@BUCKET@'
DIGEST='@DIGEST@'

id gdl_ray >/dev/null 2>&1 || useradd --create-home --shell /bin/bash gdl_ray
here=/home/gdl_ray
if [ "$(cat "$here/installed" 2>/dev/null)" != "$DIGEST" ]; then
  for _ in {1..20}; do  # at boot, Ubuntu's own updates hold apt's locks
    apt-get -qq update && break
    sleep 15
  done
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=600 install -y python3-venv
  mkdir -p "$here/code"
  gcloud storage cp --recursive "$BUCKET/code" "$here/"
  chown -R gdl_ray: "$here"
  sudo -u gdl_ray python3 -m venv "$here/venv"
  # Wheels of earlier versions may lie beside it.
  wheel=$(sha256sum "$here"/code/*.whl | sed -n "s/^${DIGEST}[0-9a-f]*  //p")
  [ -n "$wheel" ] || { echo "no wheel in $here/code has the sum $DIGEST" >&2; exit 1; }
  pip=(sudo -u gdl_ray "$here/venv/bin/python" -m pip install --quiet --constraint "$here/code/constraints.txt")
  "${pip[@]}" "${wheel}[platform,gcp]"
  "${pip[@]}" --force-reinstall --no-deps "$wheel"
  echo "$DIGEST" >"$here/installed"
fi
settings=(GDL_RAY_HOME="$here/.gdl_ray" GDL_RAY_STORAGE="$BUCKET/runs" PATH="$here/venv/bin:$PATH")
cd "$here"
exec sudo -u gdl_ray env "${settings[@]}" "$here/venv/bin/python" -m infra up
