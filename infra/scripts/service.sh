#!/bin/bash
# Runs a command as a service of this machine that comes back after a reboot: service.sh NAME COMMAND [ARGUMENT...].
# The service gets what Ray has told this shell, such as the address of the head. In its container, if there is one.
set -euo pipefail
name=$1
shift
here=$HOME/gdl_ray
mkdir -p "$here/services" "$HOME/.gdl_ray"
run=$here/services/$name

{
  echo '#!/bin/bash'
  declare -px | grep -E '^declare -x (RAY|GDL_RAY)_' || true
  if [ -n "${GDL_RAY_IMAGE:-}" ]; then
    echo 'gpus=(); nvidia-smi -L >/dev/null 2>&1 && gpus=(--gpus all)'
    echo 'mapfile -t names < <(compgen -e | grep -E "^(RAY|GDL_RAY)_")'
    printf 'exec sudo -E docker run --rm --name gdl-ray-%s --network host --ipc host' "$name"
    # shellcheck disable=SC2016  # the service expands them
    printf ' --user "$(id -u):$(id -g)" --volume "$HOME:$HOME" --env HOME="$HOME" --workdir "$HOME/.gdl_ray"'
    # shellcheck disable=SC2016
    printf ' "${gpus[@]}" "${names[@]/#/--env=}" %q python -m infra.node' "$GDL_RAY_IMAGE"
  else
    printf 'exec %q -m infra.node' "$here/venv/bin/python"
  fi
  printf ' %q' "$name" "$@"
  echo
} >"$run.new"
chmod 700 "$run.new"
mv "$run.new" "$run"

# What deploys the endpoints ends when they answer; all else stays, and comes back when it dies.
if [ "$name" = serve ]; then
  kind=$'Type=oneshot\nRemainAfterExit=yes\nRestart=on-failure'
  needs=$'After=gdl-ray-head.service gdl-ray-mlflow.service\nPartOf=gdl-ray-head.service'
else
  kind=$'Type=exec\nRestart=always'
  needs='After=network-online.target docker.service'
fi
sudo tee "/etc/systemd/system/gdl-ray-$name.service" >/dev/null <<UNIT
[Unit]
Description=gdl_ray: $name
Wants=network-online.target
StartLimitIntervalSec=0
$needs
[Service]
$kind
RestartSec=10
User=$(id -un)
WorkingDirectory=$HOME/.gdl_ray
ExecStart=$run
LimitNOFILE=65536
[Install]
WantedBy=multi-user.target
UNIT
sudo systemctl daemon-reload
sudo systemctl enable --quiet "gdl-ray-$name"
sudo systemctl restart --no-block "gdl-ray-$name"
