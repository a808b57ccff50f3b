# A pipeline, a background job, a here document, a trap.
set -euo pipefail
trap 'echo trapped >>trail' USR1
( sleep 1; echo background >>trail ) &
{
	for number in $(seq 1 500); do
		echo "$number"
		[ "$number" != 60 ] || : >mid
		sleep 0.003
	done
	until [ -e end ]; do sleep 0.01; done
} | awk '{ sum += $1; print sum }' | sha256sum >sum
wait
kill -USR1 $$
cat sum trail - >result <<END
$((6 * 7))
END
