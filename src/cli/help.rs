//! What the daemons of live migration say about themselves: `crtool image-cache --help`, `crtool image-proxy --help`.

/// `crtool image-cache --help`.
pub(super) const IMAGE_CACHE: &str = "\
Keeps snapshots of process trees in memory until they are restored on this host.

Usage:
  crtool image-cache [OPTIONS]                   run one; -d puts it into the background
  crtool image-cache list [-W DIR]               the snapshots it holds
  crtool image-cache status [-W DIR]             those, those it held before, and how it is
  crtool image-cache drop NAME [--force] [-W DIR]
                                                 forget a snapshot and free its memory
  crtool image-cache release NAME [-W DIR]       let a snapshot in doubt be restored
  crtool image-cache save NAME -D DIR [--drop]   put a copy into a directory, for restore -D DIR; only one
                                                 of the two may be restored
  crtool image-cache load NAME -D DIR            bring the images of a directory into the cache

Moving a tree from host src to host dst:
  dst# crtool image-cache -d -W /run/crtool -o cache.log
  src# crtool image-proxy -d -W /run/crtool -o proxy.log --address dst
  src# crtool dump -t PID --remote -W /run/crtool
  dst# crtool restore -d --remote -W /run/crtool
A dump can do without the proxy: crtool dump -t PID --remote --address dst. `-D NAME` of dump and restore names the
snapshot. No image touches a disk on either side.

Where it listens:
      --address HOST       only there [default: everywhere, IPv4 and IPv6]
      --port PORT          TCP port [default: 9996]
      --ps-socket FD       do not listen: use this connected socket, and end after it
  -W, --work-dir DIR       its socket for restores, img-cache.sock, is here; so are logs and pid file [default: the
                           current directory]. The socket is for the user who runs the cache, and for root.
Who may bring snapshots:
      --tls                only who has a certificate signed by the CA; everything is encrypted
      --tls-cacert FILE    that CA [default: /etc/pki/CA/cacert.pem]
      --tls-cacrl FILE     certificates that are no longer good [default: /etc/pki/CA/cacrl.pem, if it is there]
      --tls-cert FILE      our certificate [default: /etc/pki/criu/cert.pem]
      --tls-key FILE       its key [default: /etc/pki/criu/private/key.pem]
      --tls-allow SUBJECT  only who is named so by that certificate: its CN, a DNS name in it, or with a = or :
                           the whole subject as list shows it; repeatable [default: everybody who has one]
Without --tls everybody who reaches the port may: keep others off with --address or a firewall.
What comes with `crtool migrate`:
      --restore            restore it here. Words after `--` are further options of that restore:
                           image-cache --restore -- --action-script /etc/crtool/address.sh
Limits:
      --max-memory SIZE    most memory for images, with K, M or G. What does not fit is refused, if it can be before its
                           tree stands still; in any case that runs on at the source. [default: no limit]
      --max-per-source SIZE
                           most of that for one source, so that others can still send [default: three quarters]
      --at-once N          so many snapshots arrive at once; the trees of others run on meanwhile. [default: 1]
      --timeout SECONDS    longest silence of another host [default: 10]
How it runs:
  -d, --daemon             in the background; returns when it listens, with status 1 if it cannot
      --pidfile FILE       gets its pid; removed at the end
      --status-fd FD       gets a zero byte and is closed when it listens
  -o, --log-file FILE      messages; with -d there is no other place to see them
  -v                       more messages: -v0 none to -v4 all [default: 3]
      --spill DIR          told to end, it writes what is complete there; the next one takes it from there
SIGTERM and SIGINT end it when an end loses nothing: what is complete is held by systemd (FileDescriptorStoreMax=), was
spilled, or is restored, saved or dropped. Until then it waits, and takes nothing from other hosts. Told a second time
it ends at once.

The life of a snapshot, as list and status show it:
  RECEIVING   its images arrive
  PREPARED    it is complete; the source kills its tree now
  READY       it can be restored
  IN_DOUBT    it is complete, but the source vanished before it said that its tree is gone. Look there: if the tree
              runs, `drop` the snapshot; if it does not, `release` it. A restore is refused until then.
  RESTORING   a restore has it
  STARTING    its tree begins to run
  RESTORED    its tree runs here; its memory is free
  FAILED      it did not arrive; its tree runs on at the source
  DROPPED     it was freed by hand
`drop` refuses a snapshot that may be all that is left of its tree, unless it is told --force.

Exit status: 0 when told to end, 1 when it could not start or the connection of --ps-socket was lost.
";

/// `crtool image-proxy --help`.
pub(super) const IMAGE_PROXY: &str = "\
Brings the snapshots of `crtool dump --remote` on this host to an image-cache on another, over one connection.

Usage:
  crtool image-proxy [--address HOST] [OPTIONS]  run one; -d puts it into the background
  crtool image-proxy status [-W DIR]             its connection, its snapshots, and whether they were restored

Moving a tree from host src to host dst:
  dst# crtool image-cache -d -W /run/crtool -o cache.log
  src# crtool image-proxy -d -W /run/crtool -o proxy.log --address dst
  src# crtool dump -t PID --remote -W /run/crtool
  dst# crtool restore -d --remote -W /run/crtool
Either side may be started first. The tree at the source is killed when the cache has all of it, and not before;
whatever happens until then, it runs on.

Where the cache is:
      --address HOST       name or number [default: localhost]
      --port PORT          TCP port [default: 9996]
      --ps-socket FD       use this connected socket instead, and end after it
      --timeout SECONDS    longest silence of the cache, and longest wait of a dump for it to be there [default: 10]
      --compress lz4       dumps compress what they send, where it pays
Who it is:
      --tls                encrypt, prove who we are, and check who the cache is
      --tls-cacert FILE    who may have signed its certificate [default: /etc/pki/CA/cacert.pem]
      --tls-cacrl FILE     certificates that are no longer good [default: /etc/pki/CA/cacrl.pem, if it is there]
      --tls-cert FILE      our certificate [default: /etc/pki/criu/cert.pem]
      --tls-key FILE       its key [default: /etc/pki/criu/private/key.pem]
      --tls-no-cn-verify   its certificate need not carry the name in --address
      --tls-allow SUBJECT  its certificate must name SUBJECT: its CN or a DNS name in it, or with a = or : the whole
                           subject as the log shows it; repeatable
How it runs:
  -W, --work-dir DIR       its socket for dumps, img-proxy.sock, is here; so are logs and pid file [default: the
                           current directory]. The socket is for the user who runs the proxy, and for root.
  -d, --daemon             in the background; returns when it listens, with status 1 if it cannot
      --pidfile FILE       gets its pid; removed at the end
      --status-fd FD       gets a zero byte and is closed when it listens
  -o, --log-file FILE      messages; with -d there is no other place to see them
  -v                       more messages: -v0 none to -v4 all [default: 3]
SIGTERM and SIGINT end it; dumps that are on their way fail then, and their trees run on.

Exit status: 0 when told to end, 1 when it could not start or the connection of --ps-socket was lost.
";

/// `crtool migrate --help`.
pub(super) const MIGRATE: &str = "\
Lets a process tree go on on another host. It ends here only after the restored one runs there.

Usage:
  crtool migrate -t PID --to HOST[:PORT] [OPTIONS]   to the image-cache --restore there [default port: 9996]
  crtool migrate -t PID [OPTIONS]                    through the image-proxy of this work dir
  crtool migrate list [-W DIR]                       migrations whose end is not known
  crtool migrate settle [ID] [--to HOST[:PORT]]      ask the destination, and do what follows
  crtool migrate thaw ID                             it does not run there: let it go on here
  crtool migrate kill ID                             it runs there: end it here

Moving a tree from host src to host dst:
  dst# crtool image-cache -d --restore -W /run/crtool -o cache.log
  src# crtool migrate -t PID --to dst -W /run/crtool

      --max-pause SECONDS  let it go on here if the restored tree is not complete so long after the freeze
      --action-script FILE run this program at certain steps, as with dump: network-lock when the tree is frozen,
                           network-unlock when it goes on here after all; at the destination `image-cache --restore --
                           --action-script FILE`
      --json               say what is going on in lines of JSON
  -D, --images-dir NAME    a name for lists and logs [default: HOST-PID]
  -W, --work-dir DIR       logs, and the journal of a hand-over while it lasts [default: the current directory]
Options of dump that say how the tree is collected are the same here (-j is not possible), and those of its connection: --tls,
--tls-*, --compress, --ps-socket, --timeout. File locks (-l), link remapping and evasive devices are told to the restore.

Whatever fails before the restored tree is complete lets the tree go on here, and status is 1. From then on until the word
comes that it runs there the tree is frozen here, also if this command is killed; then it stays stopped, and `migrate settle`
(or the next migrate with this work dir) finds out. Where the destination cannot be asked any more, you decide: thaw or kill.

Exit status: 0 it runs there and is gone here; 1 it runs on here; 2 it runs there, but a later step failed.
";
