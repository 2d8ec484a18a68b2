# Both nodes have booted what the master serves and said so, and the service in the container answers.
for try in $(seq 50); do
    if depot-ask GET /nodes | grep -c '"state": "bootstrap"' | grep -q -x 2 && depot-ask GET / 8080; then
        exit 0
    fi
    sleep 2
done
depot-ask GET /nodes
systemctl --no-pager status depot depot-dhcp depot-web
exit 1
