# shellcheck shell=sh
# Both nodes have booted what the master serves and said so, and the service in the container answers.
for _ in $(seq 100); do
    booted=$(depot-ask GET /nodes | grep -o '"state": "bootstrap"' | wc -l)
    if [ "$booted" = 2 ] && depot-ask GET / 8080; then
        exit 0
    fi
    sleep 2
done
depot-ask GET /nodes
systemctl --no-pager status depot depot-dhcp depot-web
exit 1
