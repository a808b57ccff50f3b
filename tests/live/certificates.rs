//! Certificates for the hosts of a trial, signed by an authority of the trial's own.

use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

pub const AUTHORITY: &str = "authority.pem";
pub const CERTIFICATE: &str = "certificate.pem";
pub const KEY: &str = "key.pem";

pub fn is_one(name: &str) -> bool {
    [AUTHORITY, CERTIFICATE, KEY].contains(&name)
}

/// Writes a host's certificate for `names`, its key and the authority's certificate into `dir`. The authority's own key
/// is in the file `authority`, made if it is not there.
pub fn make(dir: &Path, names: &[&str], authority: &Path) -> Result<(), String> {
    let failed = |e: rcgen::Error| format!("make certificates: {e}");
    let put = |name: &str, text: String| {
        std::fs::write(dir.join(name), text).map_err(|e| format!("write {name} of a host: {e}"))
    };
    let key = match std::fs::read_to_string(authority) {
        Ok(pem) => KeyPair::from_pem(&pem).map_err(failed)?,
        Err(_) => {
            let key = KeyPair::generate().map_err(failed)?;
            std::fs::write(authority, key.serialize_pem()).map_err(|e| format!("write the key: {e}"))?;
            key
        }
    };
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority of a test");
    put(AUTHORITY, params.self_signed(&key).map_err(failed)?.pem())?;
    let issuer = Issuer::new(params, key);
    let own = KeyPair::generate().map_err(failed)?;
    let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
    let certificate =
        CertificateParams::new(names).and_then(|p| p.signed_by(&own, &issuer)).map_err(failed)?;
    put(CERTIFICATE, certificate.pem())?;
    put(KEY, own.serialize_pem())
}
