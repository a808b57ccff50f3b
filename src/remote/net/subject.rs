//! Whom a certificate names, and whether that is somebody who may enter.
//!
//! A certificate that was verified says who is at the other end: its subject, written as RFC 4514 has it
//! ("CN=src.example.org,O=Example"), or where that is empty its subjectAltNames ("DNS:src.example.org,URI:spiffe://a/b").
//! That text is the owner of what its holder brings, so two certificates have the same text only if they name the same; it
//! has no character that is not to be seen. What is not here: whether a certificate is good, which rustls finds out.

use std::fmt::Write as _;

use rustls::pki_types::CertificateDer;
use x509_cert::Certificate;
use x509_cert::der::asn1::ObjectIdentifier;
use x509_cert::der::{Decode as _, Encode as _};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::{DirectoryString, GeneralName};

use crate::remote::name;

/// id-at-commonName.
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");
/// Longest text, in bytes. It is never cut, because two owners must not become one.
const LONGEST: usize = 1024;

/// Whom a certificate names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Subject {
    text: String,
    common_names: Vec<String>,
    dns_names: Vec<String>,
}

/// What is not to be seen becomes `\xx`, byte by byte; whatever comes from outside has its own backslashes escaped.
fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if name::is_hidden(c) {
            for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                let _ = write!(shown, "\\{byte:02x}");
            }
        } else {
            shown.push(c);
        }
    }
    shown
}

/// One of several names in a list of them.
fn escaped(text: &str) -> String {
    visible(&text.replace('\\', "\\\\").replace(',', "\\,"))
}

fn alternative(name: &GeneralName) -> Result<String, String> {
    Ok(match name {
        GeneralName::DnsName(name) => format!("DNS:{}", escaped(name.as_str())),
        GeneralName::UniformResourceIdentifier(uri) => format!("URI:{}", escaped(uri.as_str())),
        GeneralName::Rfc822Name(address) => format!("email:{}", escaped(address.as_str())),
        GeneralName::DirectoryName(name) => format!("DirName:{}", escaped(&name.to_string())),
        other => {
            let bytes = other.to_der().map_err(|e| e.to_string())?;
            bytes.iter().fold("#".to_owned(), |text, byte| text + &format!("{byte:02x}"))
        }
    })
}

impl Subject {
    /// Whom this certificate names. An error says what is wrong with it.
    pub(super) fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let odd = |e: &dyn std::fmt::Display| format!("it cannot be read: {e}");
        let certificate = Certificate::from_der(certificate).map_err(|e| odd(&e))?;
        let certificate = certificate.tbs_certificate();
        let subject = certificate.subject();
        let names = certificate.get_extension::<SubjectAltName>().map_err(|e| odd(&e))?;
        let names = names.map(|(_, names)| names.0).unwrap_or_default();
        let mut text = visible(&subject.to_string());
        if text.is_empty() {
            let all: Result<Vec<String>, String> = names.iter().map(alternative).collect();
            text = all.map_err(|e| odd(&e))?.join(",");
        }
        if text.is_empty() {
            return Err("it names nobody: it has neither a subject nor a subjectAltName".to_owned());
        }
        if text.len() > LONGEST {
            return Err(format!("its subject is longer than {LONGEST} bytes"));
        }
        let common = subject.iter().filter(|attribute| attribute.oid == COMMON_NAME);
        let common = common.filter_map(|attribute| match attribute.value.decode_as().ok()? {
            DirectoryString::PrintableString(name) => Some(name.as_str().to_owned()),
            DirectoryString::TeletexString(name) => Some(name.as_str().to_owned()),
            DirectoryString::Utf8String(name) => Some(name),
            DirectoryString::BmpString(name) => Some(name.to_string()),
        });
        let dns = names.iter().filter_map(|name| match name {
            GeneralName::DnsName(name) => Some(name.as_str().to_owned()),
            _ => None,
        });
        Ok(Self { common_names: common.collect(), dns_names: dns.collect(), text })
    }

    /// As it is shown and compared.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether one of these (`--tls-allow`) stands for it: with a `=` or `:` in it the whole text, else one of its common
    /// names or DNS names. Never a part of one, and never a common name that looks like a whole subject.
    pub(super) fn is_among(&self, allowed: &[String]) -> bool {
        allowed.iter().any(|allowed| {
            if allowed.contains(['=', ':']) {
                return *allowed == self.text;
            }
            self.common_names.contains(allowed)
                || self.dns_names.iter().any(|name| name.eq_ignore_ascii_case(allowed))
        })
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType, string::Ia5String};

    use super::*;

    fn subject(names: &[(DnType, &str)], alternatives: &[SanType]) -> Result<Subject, String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, name) in names {
            params.distinguished_name.push(kind.clone(), *name);
        }
        params.subject_alt_names = alternatives.to_vec();
        let key = KeyPair::generate().unwrap();
        Subject::of(params.self_signed(&key).unwrap().der())
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(Ia5String::try_from(name).unwrap())
    }

    #[test]
    fn who_is_meant_by_which_words() {
        use DnType::{CommonName, OrganizationName};
        let plain =
            subject(&[(OrganizationName, "Example"), (CommonName, "src")], &[dns("Src.example")]).unwrap();
        assert_eq!(plain.text(), "CN=src,O=Example");
        for (words, wanted) in [
            (&["src"][..], true),
            (&["src.example"], true),
            (&["CN=src,O=Example"], true),
            (&["other", "src"], true),
            (&[], false),
            (&["sr", "rc", "SRC", "src.example.", "example", "*", "", "Example"], false),
            (&["CN=src", "O=Example", "O=Example,CN=src", "CN=src, O=Example", "DNS:src.example"], false),
        ] {
            let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
            assert_eq!(plain.is_among(&words), wanted, "{words:?}");
        }
        // A name that was chosen to look like the subject of somebody else.
        let forged = subject(&[(CommonName, "src,O=Example")], &[]).unwrap();
        assert_eq!(forged.text(), "CN=src\\,O=Example");
        assert!(!forged.is_among(&["CN=src,O=Example".to_owned(), "src,O=Example".to_owned()]));
        let forged = subject(&[(CommonName, "CN=src,O=Example")], &[]).unwrap();
        assert!(!forged.is_among(&["CN=src,O=Example".to_owned()]));
    }

    #[test]
    fn what_names_nobody_by_its_subject() {
        let uri = SanType::URI(Ia5String::try_from("spiffe://a/b,c").unwrap());
        let several = [dns("a.example"), uri, SanType::IpAddress("192.0.2.1".parse().unwrap())];
        let alternatives = subject(&[], &several).unwrap();
        assert_eq!(alternatives.text(), "DNS:a.example,URI:spiffe://a/b\\,c,#8704c0000201");
        assert!(alternatives.is_among(&["a.example".to_owned()]));
        let nobody = subject(&[], &[]).unwrap_err();
        assert!(nobody.contains("neither a subject nor a subjectAltName"), "{nobody}");
        let damaged = Subject::of(&CertificateDer::from(vec![1, 2, 3])).unwrap_err();
        assert!(damaged.contains("cannot be read"), "{damaged}");
    }

    #[test]
    fn lines_stay_lines_and_owners_apart() {
        let shown = |name: &str| subject(&[(DnType::CommonName, name)], &[]).unwrap().text().to_owned();
        assert_eq!(shown("a\nb\u{202e}c\\0a"), "CN=a\\0ab\\e2\\80\\aec\\\\0a");
        assert_ne!(shown("a\n"), shown("a\\0a"));
        let long = subject(&[(DnType::CommonName, &"x".repeat(2000))], &[]).unwrap_err();
        assert!(long.contains("longer than 1024 bytes"), "{long}");
    }
}
