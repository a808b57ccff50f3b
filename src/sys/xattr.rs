//! Extended attributes of what a path leads to.

use std::ffi::{CStr, CString};

use super::{Errno, Result, ret};

fn sized(call: impl Fn(*mut libc::c_void, usize) -> isize) -> Result<Vec<u8>> {
    loop {
        let len = ret(call(std::ptr::null_mut(), 0) as libc::c_long)?.unsigned_abs() as usize;
        let mut bytes = vec![0u8; len];
        if len == 0 {
            return Ok(bytes);
        }
        match ret(call(bytes.as_mut_ptr().cast(), len) as libc::c_long) {
            Ok(got) => {
                bytes.truncate(got.unsigned_abs() as usize);
                return Ok(bytes);
            }
            // It has grown in between.
            Err(Errno::ERANGE) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// listxattr: the names.
pub fn list(path: &CStr) -> Result<Vec<CString>> {
    // SAFETY: the path is terminated, and the kernel writes as much as it is told that there is room for.
    let names = sized(|to, len| unsafe { libc::listxattr(path.as_ptr(), to.cast(), len) })?;
    let names = names.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names.map(|name| CString::new(name).map_err(|_| Errno::EINVAL)).collect()
}

/// getxattr.
pub fn get(path: &CStr, name: &CStr) -> Result<Vec<u8>> {
    // SAFETY: the names are terminated, and the kernel writes as much as it is told that there is room for.
    sized(|to, len| unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), to, len) })
}

/// setxattr.
pub fn set(path: &CStr, name: &CStr, value: &[u8]) -> Result<()> {
    let (at, len) = (value.as_ptr().cast(), value.len());
    // SAFETY: the names are terminated, and the value is as long as is said.
    ret(unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), at, len, 0) } as libc::c_long)?;
    Ok(())
}
