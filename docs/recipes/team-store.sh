#!/usr/bin/env bash
# One MLflow store for a team: PostgreSQL for runs and points, the server's own folder for files, a login for each user.
#
#   TEAM_STORE_PASSWORD=... TEAM_STORE_DB_PASSWORD=... bash docs/recipes/team-store.sh [FOLDER]
#
# FOLDER (team-store) gets the database, the files of runs and the server's log. The next start uses it again.
# Ctrl-C or SIGTERM ends the server and the database. docs/team-store.md explains every step.
#
# TEAM_STORE_PASSWORD     password of the first user, "admin"; counts only when the folder is new
# TEAM_STORE_DB_PASSWORD  password of the database role "mlflow"; it may change with each start
# TEAM_STORE_HOST         where the server listens (127.0.0.1); TEAM_STORE_PORT (5000), TEAM_STORE_DB_PORT (5433)
# TEAM_STORE_NAMES        host names that users type, with commas: "store.example.org:5000"; all others are refused
# TEAM_STORE_WORKERS      server processes (one a core, at most 4)
set -euo pipefail

die() { printf 'team-store: %s\n' "$1" >&2; exit 2; }

[ -n "${TEAM_STORE_PASSWORD:-}" ] || die "TEAM_STORE_PASSWORD is not set. Set it to a password of 12 characters or more"
[ "${#TEAM_STORE_PASSWORD}" -ge 12 ] || die "TEAM_STORE_PASSWORD is too short: MLflow asks for 12 characters or more"
[ -n "${TEAM_STORE_DB_PASSWORD:-}" ] || die "TEAM_STORE_DB_PASSWORD is not set. Set it to a password for the database"
command -v mlflow >/dev/null || die "mlflow is not on PATH. Run: pip install 'cifar-exp[team]', or uv run --extra team bash $0"
python3 -c 'import psycopg, flask_wtf' 2>/dev/null || die "the server's packages are missing. Run: pip install 'cifar-exp[team]'"

bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1 || true)
[ -n "$bin" ] || bin=$(dirname "$(command -v postgres || true)")
[ -x "$bin/initdb" ] || die "PostgreSQL is not installed. Run: apt install postgresql"

# PostgreSQL refuses to run as root, so root gives it to the user that Debian's package has made.
as_owner() { if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }

cores=$(getconf _NPROCESSORS_ONLN)
workers=${TEAM_STORE_WORKERS:-$((cores < 4 ? cores : 4))}
host=${TEAM_STORE_HOST:-127.0.0.1} port=${TEAM_STORE_PORT:-5000} db_port=${TEAM_STORE_DB_PORT:-5433}
umask 077
mkdir -p "${1:-team-store}"
folder=$(cd "${1:-team-store}" && pwd)
mkdir -p "$folder/files" "$folder/database"
socket=$(mktemp -d /tmp/team-store.XXXXXX) # the path of a socket may have 107 characters
if [ "$(id -u)" = 0 ]; then
    chmod 711 "$folder" # lets the database's user pass, and nobody list it
    chown postgres "$folder/database" "$socket"
    as_owner test -x "$folder" || die "$folder: the user postgres may not pass one of the folders above. Give another FOLDER"
fi

cd "$folder"
server=
stop() {
    trap '' INT TERM
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; fi
    as_owner "$bin/pg_ctl" stop --pgdata database --mode fast --silent 2>/dev/null || true
    rm -rf "$socket"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# 1. The database. Over TCP it asks for a password (SCRAM). Its superuser can log in only from this machine, by the
#    socket, as the operating system's user that owns the data.
[ -e database/PG_VERSION ] ||
    as_owner "$bin/initdb" --pgdata database --encoding UTF8 --auth-local peer --auth-host scram-sha-256 >initdb.log
as_owner "$bin/pg_ctl" start --pgdata database --wait --silent --log database/server.log \
    --options "-c listen_addresses=127.0.0.1 -c port=$db_port -c unix_socket_directories=$socket"
as_owner "$bin/psql" --host "$socket" --port "$db_port" --dbname postgres --no-psqlrc --quiet --set ON_ERROR_STOP=1 <<'SQL'
\getenv password TEAM_STORE_DB_PASSWORD
SELECT 'CREATE ROLE mlflow LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mlflow') \gexec
ALTER ROLE mlflow PASSWORD :'password';
SELECT 'CREATE DATABASE mlflow OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'mlflow') \gexec
SELECT 'CREATE DATABASE logins OWNER mlflow' WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = 'logins') \gexec
SQL

# 2. The server. Passwords are in its environment: arguments can be read by every user of the machine.
database="postgresql+psycopg://mlflow@127.0.0.1:$db_port"
cat >logins.ini <<INI
[mlflow]
database_uri = $database/logins
admin_username = admin
# Everybody with a login may add to every experiment.
default_permission = EDIT
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# A password is hashed once a minute and not with each request, which would take tens of milliseconds.
auth_cache_ttl_seconds = 60
INI
export PGPASSWORD=$TEAM_STORE_DB_PASSWORD MLFLOW_AUTH_CONFIG_PATH=$folder/logins.ini
export MLFLOW_AUTH_ADMIN_PASSWORD=$TEAM_STORE_PASSWORD MLFLOW_DISABLE_TELEMETRY=true
MLFLOW_FLASK_SERVER_SECRET_KEY=$(python3 -c 'import secrets; print(secrets.token_hex())')
export MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
unset TEAM_STORE_PASSWORD TEAM_STORE_DB_PASSWORD
names=${TEAM_STORE_NAMES:+,$TEAM_STORE_NAMES}
# By default uvicorn kills a process that is silent for 5 s. On a busy machine that ends requests and never recovers.
mlflow server --app-name basic-auth --host "$host" --port "$port" --workers "$workers" \
    --backend-store-uri "$database/mlflow" --serve-artifacts --artifacts-destination "file://$folder/files" \
    --allowed-hosts "127.0.0.1:$port,localhost:$port$names" \
    --uvicorn-opts "--timeout-worker-healthcheck 120" >>server.log 2>&1 &
server=$!
echo "team-store: http://$host:$port in about 30 s; its log: $folder/server.log; Ctrl-C ends it"
wait "$server"
