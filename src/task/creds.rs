//! Credentials of a thread: ids, groups, capabilities, secure bits, no_new_privs.
//!
//! Order of a restore, by a task that has all its supervisor has: keep capabilities while ids change; groups, group
//! ids, user ids; inheritable, ambient and bounding set; the secure bits that are wanted; no_new_privs. Then seccomp
//! filters, which need CAP_SYS_ADMIN without no_new_privs; and at the very end permitted and effective set.

use std::sync::OnceLock;

use super::{Result, TaskError, ThreadParts, ThreadPlan, ThreadView};
use crate::{
    finding::Finding,
    image::pb,
    tracee::{List, Want},
};

const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const PR_SET_SECUREBITS: i32 = 28;
/// Kernel's NGROUPS_MAX.
const NGROUPS_MAX: usize = 65536;

fn words(set: u64) -> Vec<u32> {
    vec![low(set), low(set >> 32)]
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

fn set(words: &[u32], what: &str) -> Result<u64> {
    match words {
        [] => Ok(0),
        [low] => Ok(u64::from(*low)),
        [low, high] => Ok(u64::from(*high) << 32 | u64::from(*low)),
        _ => Err(TaskError::image(format!("{what}: {} words", words.len()))),
    }
}

pub(super) fn dump(
    view: &ThreadView<'_>,
    parts: &mut ThreadParts,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    let status = &view.status;
    let ambient = status.cap_amb.unwrap_or(0);
    parts.core.creds = Some(pb::CredsEntry {
        uid: status.uid.real,
        gid: status.gid.real,
        euid: status.uid.effective,
        egid: status.gid.effective,
        suid: status.uid.saved,
        sgid: status.gid.saved,
        fsuid: status.uid.fs,
        fsgid: status.gid.fs,
        cap_inh: words(status.cap_inh),
        cap_prm: words(status.cap_prm),
        cap_eff: words(status.cap_eff),
        cap_bnd: words(status.cap_bnd),
        secbits: view.cx.inside.securebits,
        groups: status.groups.clone(),
        no_new_privs: status.no_new_privs.unwrap_or(false).then_some(1),
        cap_amb: if ambient == 0 { Vec::new() } else { words(ambient) },
        ..Default::default()
    });
    let own = own_label();
    let theirs = match own {
        [] => Vec::new(),
        _ => label(format!("/proc/{}/task/{}/attr/current", view.cx.pid, view.cx.tid)),
    };
    if theirs != own {
        findings.push(Finding {
            pid: view.cx.pid,
            what: format!("security label {} of thread {}", theirs.escape_ascii(), view.cx.tid),
            reason: "crtool cannot restore labels of security modules yet".into(),
            hint: "run crtool under the same label".into(),
        });
    }
    Ok(())
}

/// A label of a security module; without one the read fails.
fn label(path: String) -> Vec<u8> {
    std::fs::read(path).unwrap_or_default()
}

/// That of crtool, which a restored task would have.
fn own_label() -> &'static [u8] {
    static OWN: OnceLock<Vec<u8>> = OnceLock::new();
    OWN.get_or_init(|| label("/proc/self/attr/current".into()))
}

pub(super) fn nothing_more(_: &ThreadView<'_>, _: &mut ThreadParts, _: &mut Vec<Finding>) -> Result<()> {
    Ok(())
}

fn creds<'a>(plan: &ThreadPlan<'a>) -> Result<&'a pb::CredsEntry> {
    plan.thread()?.creds.as_ref().ok_or_else(|| TaskError::image("credentials are missing"))
}

fn prctl(list: &mut List, name: String, option: i32, arg2: u64, arg3: u64) {
    list.call(name, libc::SYS_prctl, &[option.into(), arg2.into(), arg3.into()], Want::Zero);
}

fn bits(set: u64) -> impl Iterator<Item = u64> {
    (0..64).filter(move |bit| set >> bit & 1 == 1)
}

fn capset(list: &mut List, inh: u64, prm: u64, eff: u64) {
    let header = list.value(&[LINUX_CAPABILITY_VERSION_3, 0]);
    let data = [low(eff), low(prm), low(inh), low(eff >> 32), low(prm >> 32), low(inh >> 32)];
    let data = list.value(&data);
    let name = format!("capset permitted {prm:#x} effective {eff:#x} inheritable {inh:#x}");
    list.call(name, libc::SYS_capset, &[header.into(), data.into()], Want::Zero);
}

/// Everything but the permitted and effective set.
pub(super) fn plan(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let creds = creds(plan)?;
    let supervisor = plan.supervisor;
    let (inh, prm) = (set(&creds.cap_inh, "cap_inh")?, set(&creds.cap_prm, "cap_prm")?);
    let (amb, bnd) = (set(&creds.cap_amb, "cap_amb")?, set(&creds.cap_bnd, "cap_bnd")?);
    for (what, lacks) in [
        ("permitted", prm & !supervisor.cap_prm),
        ("bounding", bnd & !supervisor.cap_bnd),
        ("inheritable", inh & !(supervisor.cap_prm | supervisor.cap_bnd)),
    ] {
        if lacks != 0 {
            let numbers: Vec<String> = bits(lacks).map(|bit| bit.to_string()).collect();
            return Err(TaskError::Unsupported {
                what: format!("capability {} in the {what} set", numbers.join(", ")),
                reason: "crtool does not have it; run it with all capabilities the tasks had".into(),
            });
        }
    }
    if creds.groups.len() > NGROUPS_MAX {
        return Err(TaskError::image(format!("{} groups", creds.groups.len())));
    }
    prctl(
        list,
        "PR_SET_SECUREBITS to keep capabilities".into(),
        PR_SET_SECUREBITS,
        SECBIT_NO_SETUID_FIXUP.into(),
        0,
    );
    let groups: Vec<u8> = creds.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let groups = list.bytes(&groups);
    list.call("setgroups", libc::SYS_setgroups, &[creds.groups.len().into(), groups.into()], Want::Zero);
    let ids = |list: &mut List, name: &str, nr, [real, effective, saved]: [u32; 3]| {
        let args = [real.into(), effective.into(), saved.into()];
        list.call(format!("{name} {real} {effective} {saved}"), nr, &args, Want::Zero);
    };
    ids(list, "setresgid", libc::SYS_setresgid, [creds.gid, creds.egid, creds.sgid]);
    // These return the former id, and no error: the second call tells.
    let fs_id = |list: &mut List, name: &str, nr, id: u32| {
        list.call(format!("{name} {id}"), nr, &[id.into()], Want::Any);
        list.call(format!("{name} {id}"), nr, &[id.into()], Want::Equal(id.into()));
    };
    fs_id(list, "setfsgid", libc::SYS_setfsgid, creds.fsgid);
    ids(list, "setresuid", libc::SYS_setresuid, [creds.uid, creds.euid, creds.suid]);
    fs_id(list, "setfsuid", libc::SYS_setfsuid, creds.fsuid);
    capset(list, inh, supervisor.cap_prm, supervisor.cap_prm);
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    prctl(list, "PR_CAP_AMBIENT_CLEAR_ALL".into(), libc::PR_CAP_AMBIENT, clear.cast_unsigned().into(), 0);
    for cap in bits(amb) {
        let raise = libc::PR_CAP_AMBIENT_RAISE.cast_unsigned().into();
        prctl(list, format!("PR_CAP_AMBIENT_RAISE {cap}"), libc::PR_CAP_AMBIENT, raise, cap);
    }
    for cap in bits(supervisor.cap_bnd & !bnd) {
        prctl(list, format!("PR_CAPBSET_DROP {cap}"), libc::PR_CAPBSET_DROP, cap, 0);
    }
    prctl(
        list,
        format!("PR_SET_SECUREBITS {:#x}", creds.secbits),
        PR_SET_SECUREBITS,
        creds.secbits.into(),
        0,
    );
    if supervisor.no_new_privs && creds.no_new_privs() == 0 {
        // CRIU 4.1 does not save it, so its absence means little: no error.
        tracing::warn!("thread {}: has no_new_privs from now on, as crtool has", plan.tid);
    }
    if creds.no_new_privs() != 0 {
        prctl(list, "PR_SET_NO_NEW_PRIVS".into(), libc::PR_SET_NO_NEW_PRIVS, 1, 0);
    }
    Ok(())
}

/// Gives up what was needed until here.
pub(super) fn plan_last(plan: &ThreadPlan<'_>, list: &mut List) -> Result<()> {
    let creds = creds(plan)?;
    let inh = set(&creds.cap_inh, "cap_inh")?;
    let (prm, eff) = (set(&creds.cap_prm, "cap_prm")?, set(&creds.cap_eff, "cap_eff")?);
    capset(list, inh, prm, eff);
    Ok(())
}
