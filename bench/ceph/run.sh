#!/usr/bin/env bash
# kvd on a real Ceph: starts a monitor, an OSD in memory and a radosgw in a folder that goes away, makes a bucket, and runs against it what a
# bucket must stand: `kvd check`, `bench s3`, `kvd inspect s3`. `run.sh TRACE [--limit 3000 ...]` replays a trace, too.
# Needs Debian's ceph-mon, ceph-osd, radosgw, ceph-common and curl, which it installs where it may; prints `SKIPPED: why` where it may not.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages=(ceph-mon ceph-osd ceph-mgr radosgw ceph-common curl)
if ! command -v radosgw >/dev/null || ! command -v ceph-osd >/dev/null; then
    if [ "$(id -u)" -ne 0 ] || ! apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; then
        echo "SKIPPED: radosgw is not installed (apt-get install ${packages[*]})"
        exit 0
    fi
fi

port=33080 key=KVDTEST secret=kvdtestsecret
folder=$(mktemp -d)
mkdir "$folder"/{mon,osd,rgw,run}
daemons=()
trap 'kill "${daemons[@]}" 2>/dev/null; wait 2>/dev/null; rm -rf "$folder"' EXIT

cat >"$folder/ceph.conf" <<END
[global]
fsid = $(cat /proc/sys/kernel/random/uuid)
mon host = v2:127.0.0.1:33000
mon initial members = a
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default pg num = 4
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = 8589934592
log file = $folder/run/\$name.log
admin socket = $folder/run/\$name.\$pid.asok
run dir = $folder/run
ms mon client mode = crc
[mon.a]
mon data = $folder/mon
[osd.0]
osd data = $folder/osd
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:$port
rgw data = $folder/rgw
END
ceph=(-c "$folder/ceph.conf")

until_true() { # what, seconds, command...
    local what=$1 end=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$end" ]; then
            tail -n 20 "$folder"/run/*.log
            echo "$what did not come up"
            exit 1
        fi
        sleep 0.2
    done
}

fsid=$(sed -n 's/^fsid = //p' "$folder/ceph.conf")
monmaptool --create --fsid "$fsid" --addv a '[v2:127.0.0.1:33000]' "$folder/monmap" >/dev/null
ceph-mon "${ceph[@]}" -i a --mkfs --monmap "$folder/monmap"
ceph-mon "${ceph[@]}" -i a -f >"$folder/run/mon.out" 2>&1 &
daemons+=($!)
until_true "the monitor" 60 timeout 5 ceph "${ceph[@]}" status
osd=$(cat /proc/sys/kernel/random/uuid)
timeout 20 ceph "${ceph[@]}" osd new "$osd" >/dev/null
ceph-osd "${ceph[@]}" -i 0 --mkfs --osd-uuid "$osd" >/dev/null 2>&1
ceph-osd "${ceph[@]}" -i 0 -f >"$folder/run/osd.out" 2>&1 &
daemons+=($!)
until_true "the OSD" 60 sh -c "timeout 5 ceph -c '$folder/ceph.conf' osd stat | grep -q '1 up'"
radosgw "${ceph[@]}" -n client.rgw --auth-client-required=none --ms-mon-client-mode=crc -f >"$folder/run/rgw.out" 2>&1 &
daemons+=($!)
until_true "radosgw" 120 curl -s "http://127.0.0.1:$port"
timeout 60 radosgw-admin "${ceph[@]}" -n client.rgw user create --uid kvd --display-name kvd \
    --access-key "$key" --secret-key "$secret" >/dev/null 2>&1
made=$(curl -s -o /dev/null -w '%{http_code}' -X PUT -H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' \
    --aws-sigv4 aws:amz:us-east-1:s3 --user "$key:$secret" "http://127.0.0.1:$port/kvd")
[ "$made" = 200 ] || { echo "the bucket could not be made: $made"; exit 1; }

(umask 077 && printf '%s\n%s\n' "$key" "$secret" >"$folder/keys")
cat >"$folder/kvd.toml" <<END
data_dir = "$folder/data"
[dram]
capacity_bytes = "64MiB"
[nvme]
path = ""
[s3]
bucket = "kvd"
endpoint = "http://127.0.0.1:$port"
keys_file = "$folder/keys"
END
cargo build --release -p kvd -p bench
echo "== kvd check"
target/release/kvd check --config "$folder/kvd.toml" | tee "$folder/said" || true
grep -qE '^ok +s3 ' "$folder/said"
echo "== bench s3"
AWS_ACCESS_KEY_ID=$key AWS_SECRET_ACCESS_KEY=$secret target/release/bench s3 --endpoint "http://127.0.0.1:$port" --bucket kvd --pairs 3 --output json
if [ -n "${1:-}" ]; then
    echo "== bench replay"
    how=("${@:2}")
    [ ${#how[@]} -gt 0 ] || how=(--limit 3000 --dram 64MiB --nvme 128MiB --block-bytes 16KiB)
    AWS_ACCESS_KEY_ID=$key AWS_SECRET_ACCESS_KEY=$secret target/release/bench replay --trace "$1" "${how[@]}" \
        --engines 8 --s3 --s3-endpoint "http://127.0.0.1:$port" --s3-bucket kvd --output json
fi
echo "== kvd inspect s3"
target/release/kvd inspect s3 --config "$folder/kvd.toml" --verify
