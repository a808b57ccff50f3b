use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};

use super::*;
use crate::remote::net::{Stream, peer_of};

const PATIENCE: Duration = Duration::from_secs(60);

/// A CA with its files in a directory of its own.
pub(crate) struct Ca {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Settings of one who has a certificate for `host` that ends in `year`, with number `serial`.
    pub(crate) fn member(&self, host: &str, year: i32, serial: u64) -> TlsSettings {
        self.member_for(host, year, serial, &[])
    }

    /// The same for one of `uses`; for everything where there is none.
    fn member_for(
        &self,
        host: &str,
        year: i32,
        serial: u64,
        uses: &[ExtendedKeyUsagePurpose],
    ) -> TlsSettings {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, format!("member {serial}"));
        params.extended_key_usages = uses.to_vec();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let (cert_path, key_path) =
            (self.path(&format!("{serial}.pem")), self.path(&format!("{serial}.key")));
        fs::write(&cert_path, cert.pem()).unwrap();
        fs::write(&key_path, key.serialize_pem()).unwrap();
        TlsSettings {
            cacert: self.path("ca.pem"),
            cacrl: None,
            cert: cert_path,
            key: key_path,
            no_cn_verify: false,
            allow: Vec::new(),
        }
    }

    /// A list that has these numbers.
    fn revoke(&self, serials: &[u64]) -> PathBuf {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2001, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 1, 1),
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let path = self.path("crl.pem");
        fs::write(&path, list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
        path
    }
}

/// Those accept only these.
fn only(settings: &TlsSettings, allow: &[&str]) -> TlsSettings {
    TlsSettings { allow: allow.iter().map(|&subject| subject.to_owned()).collect(), ..settings.clone() }
}

/// Two ends of a connection, in the clear.
fn ends() -> (Stream, Stream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let stream = |socket: TcpStream| {
        let fd = socket.into();
        let peer = peer_of(&fd);
        Stream::new(fd, peer, PATIENCE).unwrap()
    };
    (stream(near), stream(far))
}

/// Says something and hears the same; what went wrong otherwise.
fn converse(mut stream: Stream, speaks_first: bool) -> Result<(), String> {
    let until = Instant::now() + PATIENCE;
    while !stream.greet().map_err(|e| e.to_string())? {
        stream.wait(Interest::NONE, until).map_err(|e| e.to_string())?;
        assert!(Instant::now() < until);
    }
    let word: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    let mut heard = vec![0; word.len()];
    if speaks_first {
        stream.write_all_within(&word, PATIENCE).map_err(|e| e.to_string())?;
        stream.read_exact_within(&mut heard, PATIENCE).map_err(|e| e.to_string())?;
    } else {
        stream.read_exact_within(&mut heard, PATIENCE).map_err(|e| e.to_string())?;
        stream.write_all_within(&heard, PATIENCE).map_err(|e| e.to_string())?;
    }
    assert!(heard == word);
    stream.end().map_err(|e| e.to_string())?;
    // The end is orderly on both sides.
    match stream.read_exact_within(&mut [0], PATIENCE) {
        Err(NetError::Closed { .. }) => Ok(()),
        other => Err(format!("{other:?}")),
    }
}

/// What each side says about a connection: the one that accepts, and the one that connects to `host`.
fn met(
    accepts: &TlsSettings,
    connects: &TlsSettings,
    host: &str,
) -> (Result<(), String>, Result<(), String>) {
    let server = TlsServer::new(accepts).unwrap();
    let client = TlsClient::new(connects, Some(host)).unwrap();
    let (near, far) = ends();
    let near = near.secured_server(&server).unwrap();
    let far = far.secured_client(&client).unwrap();
    let other = thread::spawn(move || converse(near, false));
    let ours = converse(far, true);
    (other.join().unwrap(), ours)
}

#[track_caller]
fn refused(who: &Result<(), String>, why: &str) {
    let Err(text) = who else { panic!("was accepted; wanted: {why}") };
    assert!(text.contains(why) && !text.contains('\n'), "{text}");
}

#[test]
fn both_sides_prove_who_they_are() {
    let ca = Ca::new();
    let (dst, src) = (ca.member("dst.example", 2100, 1), ca.member("src.example", 2100, 2));
    assert_eq!(met(&dst, &src, "dst.example"), (Ok(()), Ok(())));
    let dst = ca.member("127.0.0.1", 2100, 3);
    assert_eq!(met(&dst, &src, "127.0.0.1"), (Ok(()), Ok(())));
    let dst = ca.member("::1", 2100, 4);
    assert_eq!(met(&dst, &src, "[::1]"), (Ok(()), Ok(())));
    let with_list = |member: &TlsSettings| TlsSettings { cacrl: Some(ca.revoke(&[99])), ..member.clone() };
    assert_eq!(met(&with_list(&dst), &with_list(&src), "::1"), (Ok(()), Ok(())));
}

#[test]
fn a_wrong_name_is_refused_unless_it_does_not_matter() {
    let ca = Ca::new();
    let (dst, src) = (ca.member("dst.example", 2100, 1), ca.member("src.example", 2100, 2));
    let (_, ours) = met(&dst, &src, "other.example");
    refused(&ours, "TLS: its certificate is not for other.example: it has DnsName(\"dst.example\"");
    refused(&ours, "--tls-no-cn-verify");
    let lenient = TlsSettings { no_cn_verify: true, ..src.clone() };
    assert_eq!(met(&dst, &lenient, "other.example"), (Ok(()), Ok(())));
    // Nothing else is let go.
    let other = Ca::new();
    let stranger = TlsSettings { cacert: dst.cacert.clone(), ..other.member("dst.example", 2100, 1) };
    for host in ["dst.example", "other.example"] {
        let (_, ours) = met(&stranger, &lenient, host);
        refused(&ours, "its certificate is not signed by the CA in --tls-cacert");
    }
    let old = ca.member("dst.example", 2010, 5);
    let (_, ours) = met(&old, &lenient, "other.example");
    refused(&ours, "its certificate has expired");
}

#[test]
fn certificates_of_another_ca_are_refused() {
    let (ca, other) = (Ca::new(), Ca::new());
    let (dst, src) = (ca.member("dst", 2100, 1), other.member("src", 2100, 2));
    let (_, ours) = met(&dst, &src, "dst");
    refused(&ours, "its certificate is not signed by the CA in --tls-cacert");
    // Who connects knows the CA, who accepts does not know that of the other.
    let src = TlsSettings { cacert: dst.cacert.clone(), ..src };
    let (theirs, ours) = met(&dst, &src, "dst");
    refused(&theirs, "its certificate is not signed by the CA in --tls-cacert");
    assert!(ours.is_err());
}

#[test]
fn expired_certificates_are_refused() {
    let ca = Ca::new();
    let (good, old) = (ca.member("dst", 2100, 1), ca.member("dst", 2010, 2));
    let (_, ours) = met(&old, &good, "dst");
    refused(&ours, "TLS: its certificate has expired");
    let (theirs, ours) = met(&good, &old, "dst");
    refused(&theirs, "TLS: its certificate has expired");
    assert!(ours.is_err());
}

#[test]
fn revoked_certificates_are_refused() {
    let ca = Ca::new();
    let (dst, src) = (ca.member("dst", 2100, 1), ca.member("src", 2100, 2));
    let list = Some(ca.revoke(&[2]));
    let (theirs, ours) = met(&TlsSettings { cacrl: list, ..dst.clone() }, &src, "dst");
    refused(&theirs, "TLS: its certificate is revoked");
    assert!(ours.is_err());
    let list = Some(ca.revoke(&[1]));
    let (_, ours) = met(&dst, &TlsSettings { cacrl: list, no_cn_verify: true, ..src }, "dst");
    refused(&ours, "TLS: its certificate is revoked");
}

#[test]
fn certificates_for_the_other_side_are_refused() {
    use ExtendedKeyUsagePurpose::{ClientAuth, CodeSigning, ServerAuth};
    let ca = Ca::new();
    let of = |serial: u64, uses: &[ExtendedKeyUsagePurpose]| ca.member_for("dst", 2100, serial, uses);
    let (both, none) = (of(1, &[ServerAuth, ClientAuth]), of(2, &[]));
    let (server, client, neither) = (of(3, &[ServerAuth]), of(4, &[ClientAuth]), of(5, &[CodeSigning]));
    for (accepts, connects) in [(&both, &both), (&server, &client), (&none, &none)] {
        assert_eq!(met(accepts, connects, "dst"), (Ok(()), Ok(())));
    }
    let why = "TLS: its certificate is not for this side of a connection (extendedKeyUsage)";
    for wrong in [&server, &neither] {
        let (theirs, ours) = met(&both, wrong, "dst");
        refused(&theirs, why);
        assert!(ours.is_err());
    }
    for wrong in [&client, &neither] {
        for connects in [both.clone(), TlsSettings { no_cn_verify: true, ..only(&both, &["dst"]) }] {
            let (theirs, ours) = met(wrong, &connects, "dst");
            refused(&ours, why);
            let told = "the other side refused our certificate (--tls-cert): it is not for this side";
            refused(&theirs, told);
        }
    }
}

#[test]
fn only_those_who_are_named_may_enter() {
    let ca = Ca::new();
    let (dst, src) = (ca.member("dst.example", 2100, 1), ca.member("src.example", 2100, 2));
    for allow in [
        &["src.example"][..],
        &["SRC.example"],
        &["member 2"],
        &["CN=member 2,O=Example"],
        &["other", "member 2", "third"],
    ] {
        assert_eq!(met(&only(&dst, allow), &src, "dst.example"), (Ok(()), Ok(())), "{allow:?}");
    }
    let stranger = "it is that of CN=member 2,O=Example, whom --tls-allow does not name";
    for allow in
        [&["member"][..], &["member 1", "dst.example"], &["example"], &["CN=member 2"], &["*.example"]]
    {
        let (theirs, ours) = met(&only(&dst, allow), &src, "dst.example");
        refused(&theirs, stranger);
        assert!(ours.is_err());
    }
    // The same the other way round, also where the name does not count.
    for no_cn_verify in [false, true] {
        let src = TlsSettings { no_cn_verify, ..src.clone() };
        assert_eq!(met(&dst, &only(&src, &["member 1"]), "dst.example"), (Ok(()), Ok(())));
        let (theirs, ours) = met(&dst, &only(&src, &["member 2"]), "dst.example");
        refused(&ours, "it is that of CN=member 1,O=Example, whom --tls-allow does not name");
        refused(&theirs, "the other side refused our certificate (--tls-cert): whom it names may not enter");
    }
    // To be named is not enough.
    let other = Ca::new();
    let forged = other.member("src.example", 2100, 2);
    let forged = TlsSettings { cacert: dst.cacert.clone(), ..forged };
    let (theirs, _) = met(&only(&dst, &["member 2"]), &forged, "dst.example");
    refused(&theirs, "its certificate is not signed by the CA in --tls-cacert");
}

#[test]
fn who_is_at_the_other_end_is_known_once_it_is_proven() {
    let ca = Ca::new();
    let (dst, src) = (ca.member("dst", 2100, 1), ca.member("src", 2100, 2));
    let (near, far) = ends();
    let mut near = near.secured_server(&TlsServer::new(&dst).unwrap()).unwrap();
    let mut far = far.secured_client(&TlsClient::new(&src, Some("dst")).unwrap()).unwrap();
    let until = Instant::now() + PATIENCE;
    assert_eq!((near.origin(), far.origin()), ("127.0.0.1", "127.0.0.1"));
    while !(near.greet().unwrap() & far.greet().unwrap()) {
        assert!(Instant::now() < until);
    }
    assert_eq!((near.origin(), far.origin()), ("CN=member 2,O=Example", "CN=member 1,O=Example"));
}

#[test]
fn the_refused_side_is_told_why() {
    // The reason comes with the first bytes: nothing has been sent meanwhile that could reset the connection.
    let ca = Ca::new();
    let (dst, old) = (ca.member("dst", 2100, 1), ca.member("src", 2010, 2));
    let (near, far) = ends();
    let near = near.secured_server(&TlsServer::new(&dst).unwrap()).unwrap();
    let mut far = far.secured_client(&TlsClient::new(&old, Some("dst")).unwrap()).unwrap();
    let other = thread::spawn(move || converse(near, false));
    let error = far.read_exact_within(&mut [0], PATIENCE).unwrap_err().to_string();
    assert!(
        error.contains("TLS: the other side refused our certificate (--tls-cert): it has expired"),
        "{error}"
    );
    refused(&other.join().unwrap(), "has expired");
}

#[test]
fn only_one_side_speaks_tls() {
    let ca = Ca::new();
    let member = ca.member("dst", 2100, 1);
    // Who connects does not.
    let (near, mut far) = ends();
    let mut near = near.secured_server(&TlsServer::new(&member).unwrap()).unwrap();
    far.write_all_within(&crate::remote::wire::MAGIC, PATIENCE).unwrap();
    let error = near.read_exact_within(&mut [0], PATIENCE).unwrap_err().to_string();
    assert!(error.contains("TLS: it does not speak TLS; is --tls given there?"), "{error}");
    let mut first = [0; 3];
    far.read_exact_within(&mut first, PATIENCE).unwrap();
    assert!(looks_like_tls(&first), "{first:?}");
    assert!(!looks_like_tls(&crate::remote::wire::MAGIC));
    // Who accepts does not: it sees no magic and closes.
    let (mut near, far) = ends();
    let mut far = far.secured_client(&TlsClient::new(&member, Some("dst")).unwrap()).unwrap();
    assert!(!far.greet().unwrap());
    near.read_exact_within(&mut first, PATIENCE).unwrap();
    assert!(looks_like_tls(&first));
    drop(near);
    let error = far.read_exact_within(&mut [0], PATIENCE).unwrap_err().to_string();
    assert!(error.contains("it closed the connection without a word; is --tls given there?"), "{error}");
}

#[test]
fn a_cut_is_no_end() {
    let ca = Ca::new();
    let member = ca.member("dst", 2100, 1);
    let (near, far) = ends();
    let mut near = near.secured_server(&TlsServer::new(&member).unwrap()).unwrap();
    let mut far = far.secured_client(&TlsClient::new(&member, Some("dst")).unwrap()).unwrap();
    let until = Instant::now() + PATIENCE;
    while !(near.greet().unwrap() & far.greet().unwrap()) {
        assert!(Instant::now() < until);
    }
    far.write_all_within(b"x", PATIENCE).unwrap();
    drop(far);
    near.read_exact_within(&mut [0], PATIENCE).unwrap();
    let error = near.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
}

#[test]
fn what_was_decrypted_is_not_forgotten() {
    let ca = Ca::new();
    let member = ca.member("dst", 2100, 1);
    let (near, far) = ends();
    let mut near = near.secured_server(&TlsServer::new(&member).unwrap()).unwrap();
    let mut far = far.secured_client(&TlsClient::new(&member, Some("dst")).unwrap()).unwrap();
    assert_eq!(far.interest(), Interest::BOTH);
    let until = Instant::now() + PATIENCE;
    while !(near.greet().unwrap() & far.greet().unwrap()) {
        assert!(Instant::now() < until);
    }
    assert_eq!(far.interest(), Interest::NONE);
    far.write_all_within(&[7; 1000], PATIENCE).unwrap();
    near.read_exact_within(&mut [0; 1], PATIENCE).unwrap();
    assert!(near.pending());
    assert_eq!(near.wait(Interest::READ, Instant::now()).unwrap(), Interest::READ);
    near.read_exact_within(&mut [0; 999], PATIENCE).unwrap();
    assert!(!near.pending());
    assert_eq!(near.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert!(near.splice_from(near_pipe().as_fd(), 1).is_err(), "nothing goes round the encryption");
}

fn near_pipe() -> OwnedFd {
    crate::sys::pipe::pipe2(libc::O_CLOEXEC | libc::O_NONBLOCK).unwrap().0
}

#[test]
fn files_that_will_not_do_are_named() {
    let ca = Ca::new();
    let good = ca.member("dst", 2100, 1);
    let second = ca.member("dst", 2100, 2);
    let empty = ca.path("empty");
    fs::write(&empty, "hello").unwrap();
    let broken = ca.path("broken");
    fs::write(&broken, "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n").unwrap();
    let cut = ca.path("cut");
    fs::write(&cut, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let none = ca.path("none");
    let all = [
        (TlsSettings { cacert: none.clone(), ..good.clone() }, "tls-cacert", "No such file or directory"),
        (TlsSettings { cert: none.clone(), ..good.clone() }, "tls-cert", "No such file or directory"),
        (TlsSettings { key: none.clone(), ..good.clone() }, "tls-key", "No such file or directory"),
        (TlsSettings { cacrl: Some(none), ..good.clone() }, "tls-cacrl", "No such file or directory"),
        (
            TlsSettings { cacert: empty.clone(), ..good.clone() },
            "tls-cacert",
            "there is no certificate in it",
        ),
        (TlsSettings { cert: empty.clone(), ..good.clone() }, "tls-cert", "there is no certificate in it"),
        (TlsSettings { key: empty.clone(), ..good.clone() }, "tls-key", "there is no private key"),
        (TlsSettings { cacrl: Some(empty), ..good.clone() }, "tls-cacrl", "there is no revocation list"),
        (TlsSettings { cacert: broken.clone(), ..good.clone() }, "tls-cacert", "it is damaged"),
        (TlsSettings { cacert: cut.clone(), ..good.clone() }, "tls-cacert", "no good as a CA"),
        (TlsSettings { cert: cut, ..good.clone() }, "tls-cert", "no good as a certificate"),
        (TlsSettings { key: second.key, ..good.clone() }, "tls-key", "it is not the key of --tls-cert"),
    ];
    for (settings, option, why) in all {
        for error in [
            TlsServer::new(&settings).unwrap_err().to_string(),
            TlsClient::new(&settings, Some("dst")).unwrap_err().to_string(),
        ] {
            assert!(error.starts_with(&format!("option --{option}: /")), "{error}");
            assert!(error.contains(why) && !error.contains('\n'), "{why}: {error}");
        }
    }
    assert!(TlsClient::new(&good, Some("no name")).is_err());
    assert!(TlsServer::new(&good).is_ok());
}
