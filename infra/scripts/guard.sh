#!/bin/bash
# Ends this machine when its stack has had its time, and a worker whose cluster has gone. Runs at the first boot, as
# root, before anything else can fail; needs no network, no permission and nobody who remembers.
# The renderer of the cluster file puts the two values in; no time where the cloud itself ends the machine.
EXPIRES_AT='@EXPIRES_AT@'
ROLE='@ROLE@'

timers=()

if [ -n "$EXPIRES_AT" ]; then
  minutes=$((($(date -d "$EXPIRES_AT" +%s) - $(date +%s)) / 60))
  shutdown -h "+$((minutes > 1 ? minutes : 1))"

  # A reboot forgets a shutdown that was planned. A timer with a date of its own does not, even if the date has passed.
  cat >/etc/systemd/system/gdl-ray-expire.service <<UNIT
[Unit]
Description=The time of this stack is over
[Service]
Type=oneshot
ExecStart=/sbin/shutdown -h now
UNIT
  cat >/etc/systemd/system/gdl-ray-expire.timer <<UNIT
[Unit]
Description=When the time of this stack is over
[Timer]
OnCalendar=$(date -u -d "$EXPIRES_AT" '+%Y-%m-%d %H:%M:%S') UTC
Persistent=true
[Install]
WantedBy=timers.target
UNIT
  timers+=(gdl-ray-expire.timer)
fi

if [ "$ROLE" = worker ]; then
  cat >/usr/local/sbin/gdl-ray-watchdog <<'WATCHDOG'
#!/bin/bash
# Ends this machine when no raylet has run for 20 minutes: the head is gone, or Ray was never set up.
seen=/run/gdl-ray-raylet
if [ ! -e "$seen" ] || pgrep -x raylet >/dev/null; then
  touch "$seen"
elif [ -n "$(find "$seen" -mmin +20)" ]; then
  shutdown -h now
fi
WATCHDOG
  chmod 755 /usr/local/sbin/gdl-ray-watchdog
  cat >/etc/systemd/system/gdl-ray-watchdog.service <<UNIT
[Unit]
Description=End this worker if its cluster has gone
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/gdl-ray-watchdog
UNIT
  cat >/etc/systemd/system/gdl-ray-watchdog.timer <<UNIT
[Unit]
Description=Look every two minutes whether the cluster of this worker is there
[Timer]
OnBootSec=2min
OnUnitActiveSec=2min
[Install]
WantedBy=timers.target
UNIT
  timers+=(gdl-ray-watchdog.timer)
fi
systemctl daemon-reload
[ "${#timers[@]}" = 0 ] || systemctl enable --now "${timers[@]}"
