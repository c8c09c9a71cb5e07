#!/bin/sh
# Gives each variable NAME the content of the file that NAME_FILE=/run/secrets/... names, and then runs a
# command, as the user `app` if it is root: secrets may be files that root alone can read.
set -eu
folder=${SECRETS_FOLDER:-/run/secrets}
for name in $(env | sed -n "s|^\([A-Z][A-Z0-9_]*\)_FILE=$folder/.*|\1|p"); do
  eval "file=\$${name}_FILE"
  if [ ! -s "$file" ]; then
    echo "$file, the secret for $name, is missing or empty: \`python -m infra.docker init\` makes it" >&2
    exit 1
  fi
  export "$name=$(cat "$file")"
  unset "${name}_FILE"
done
if [ "$(id -u)" = 0 ]; then
  exec setpriv --reuid=app --regid=app --init-groups "$@"
fi
exec "$@"
