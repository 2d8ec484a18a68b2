#!/bin/sh
# In the sandbox, without network: compares /in/first with /in/second; what diffoscope finds goes to /out/differences.
set -eu
cd /in
mkdir -m 777 /tmp/report
# it ends with 1 when it found differences; what else goes wrong stands in its report, or there is none
setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --inh-caps=-all --bounding-set=-all \
    env HOME=/tmp diffoscope --no-progress --exclude-directory-metadata=yes --max-text-report-size=1000000 \
    --max-diff-block-lines=40 --text=/tmp/report/differences first second || [ $? = 1 ]
cp /tmp/report/differences /out/
