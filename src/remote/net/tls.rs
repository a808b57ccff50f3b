//! TLS 1.3 on a connection: each side has a certificate and looks at the other's.
//!
//! The cache accepts whoever has a certificate of the CA (`--tls-cacert`) that is not revoked (`--tls-cacrl`) and is for
//! clients, where it says what it is for. Who connects to it wants one for servers, and the name it connects to in it, as a
//! subjectAltName; `--tls-no-cn-verify` lets that name go, and nothing else. With `--tls-allow` either side accepts only those
//! whom it names. Sessions are not resumed, so that every connection proves all of it anew.

use std::fs;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use nix::sys::socket::{self, MsgFlags};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct,
    DistinguishedName, OtherError, RootCertStore, ServerConfig, ServerConnection, SignatureScheme, version,
};

use super::subject::Subject;
use super::{NetError, again, resolve};
use crate::remote::poll::Interest;
use crate::settings::TlsSettings;

/// Plaintext that may wait for the socket, in bytes.
const HELD: usize = 512 << 10;
/// What is received at once, in bytes.
const RECEIVED: usize = 256 << 10;
/// The same until both sides know each other.
const RECEIVED_FIRST: usize = 8 << 10;
/// What is read of a connection that is refused, in bytes: closed with something unread, the reason would be lost.
const DRAINED: usize = 256 << 10;

/// How to connect with TLS.
#[derive(Debug, Clone)]
pub struct TlsClient {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// How to accept with TLS.
#[derive(Debug, Clone)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
}

/// The files that both sides need.
#[derive(Debug)]
struct Files {
    roots: Arc<RootCertStore>,
    crls: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn bad(option: &'static str, path: &Path, why: impl Into<String>) -> NetError {
    NetError::TlsFile { option, path: path.to_owned(), why: why.into() }
}

/// All sections of one kind in a PEM file; at least one.
fn sections<T: PemObject>(option: &'static str, path: &Path, what: &str) -> Result<Vec<T>, NetError> {
    let bytes = fs::read(path).map_err(|e| bad(option, path, super::plainly(&e)))?;
    let found: Result<Vec<T>, pem::Error> = T::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(bad(option, path, format!("there is no {what} in it (PEM)"))),
        Ok(found) => Ok(found),
        Err(error) => Err(bad(option, path, format!("it is damaged: {error}"))),
    }
}

impl Files {
    fn read(settings: &TlsSettings) -> Result<Self, NetError> {
        let mut roots = RootCertStore::empty();
        for cert in sections(CACERT, &settings.cacert, "certificate")? {
            roots.add(cert).map_err(|e| bad(CACERT, &settings.cacert, format!("no good as a CA: {e}")))?;
        }
        let crls = match &settings.cacrl {
            Some(path) => sections(CACRL, path, "revocation list")?,
            None => Vec::new(),
        };
        let chain = sections(CERT, &settings.cert, "certificate")?;
        let what = "private key that is not encrypted";
        let keys: Vec<PrivateKeyDer<'static>> = sections(KEY, &settings.key, what)?;
        let Some(key) = keys.into_iter().next() else { return Err(bad(KEY, &settings.key, "it is empty")) };
        Ok(Self { roots: Arc::new(roots), crls, chain, key })
    }
}

const CACERT: &str = "tls-cacert";
const CACRL: &str = "tls-cacrl";
const CERT: &str = "tls-cert";
const KEY: &str = "tls-key";

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The list is the CA's; that a list lacks some other CA in the chain says nothing.
fn bad_crl(settings: &TlsSettings, error: &dyn std::fmt::Display) -> NetError {
    let path = settings.cacrl.as_ref().unwrap_or(&settings.cacert);
    bad(CACRL, path, format!("no good as a revocation list: {error}"))
}

/// Certificate and key do not go together, or cannot be used.
fn bad_key(settings: &TlsSettings, error: &rustls::Error) -> NetError {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            let why = format!("it is not the key of --tls-cert {}", settings.cert.display());
            bad(KEY, &settings.key, why)
        }
        rustls::Error::InvalidCertificate(why) => {
            bad(CERT, &settings.cert, format!("no good as a certificate: {why:?}"))
        }
        other => bad(KEY, &settings.key, format!("no good as a key: {other}")),
    }
}

impl TlsClient {
    /// Reads the files. `host` is the name or number that the certificate of the other side must carry.
    pub fn new(settings: &TlsSettings, host: Option<&str>) -> Result<Self, NetError> {
        let host = host.unwrap_or("localhost");
        let bare = resolve::bare(host);
        let bare = bare.split('%').next().unwrap_or(bare);
        let name = ServerName::try_from(bare.to_owned()).map_err(|_| NetError::Resolve {
            name: host.to_owned(),
            why: "it is no name that a certificate can carry".to_owned(),
        })?;
        let files = Files::read(settings)?;
        let verifier = WebPkiServerVerifier::builder_with_provider(files.roots, provider())
            .with_crls(files.crls)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()
            .map_err(|e| bad_crl(settings, &e))?;
        let (allow, any_name) = (settings.allow.clone(), settings.no_cn_verify);
        let verifier = Arc::new(Only { verifier, allow, any_name });
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|e| bad_key(settings, &e))?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(files.chain, files.key)
            .map_err(|e| bad_key(settings, &e))?;
        config.resumption = Resumption::disabled();
        Ok(Self { config: Arc::new(config), name })
    }
}

impl TlsServer {
    /// Reads the files.
    pub fn new(settings: &TlsSettings) -> Result<Self, NetError> {
        let files = Files::read(settings)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(files.roots, provider())
            .with_crls(files.crls)
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()
            .map_err(|e| bad_crl(settings, &e))?;
        let verifier = Arc::new(Only { verifier, allow: settings.allow.clone(), any_name: false });
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|e| bad_key(settings, &e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(files.chain, files.key)
            .map_err(|e| bad_key(settings, &e))?;
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config) })
    }
}

/// Verifies what `verifier` does, and that it is somebody who may enter.
#[derive(Debug)]
struct Only<V: ?Sized> {
    allow: Vec<String>,
    /// The name of a server need not be the one that was connected to.
    any_name: bool,
    verifier: Arc<V>,
}

impl<V: ?Sized> Only<V> {
    fn look(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let refused = |why: String| {
            let why: Box<dyn std::error::Error + Send + Sync> = why.into();
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why.into())))
        };
        let subject = Subject::of(certificate).map_err(refused)?;
        if !self.allow.is_empty() && !subject.is_among(&self.allow) {
            return Err(refused(format!("it is that of {}, whom --tls-allow does not name", subject.text())));
        }
        Ok(())
    }
}

impl ServerCertVerifier for Only<WebPkiServerVerifier> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        // The name is looked at last, after signatures, dates and revocation.
        let verified = match self.verifier.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if self.any_name => ServerCertVerified::assertion(),
            other => other?,
        };
        self.look(end_entity).map(|()| verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Only<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        self.look(end_entity).map(|()| verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// The socket as rustls wants it.
struct Socket<'a>(BorrowedFd<'a>);

impl Read for Socket<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        again(|| socket::recv(self.0.as_raw_fd(), into, MsgFlags::empty()))
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        again(|| socket::sendmsg::<()>(self.0.as_raw_fd(), from, &[], MsgFlags::MSG_NOSIGNAL, None))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// TLS of one connection.
#[derive(Debug)]
pub(super) struct Session {
    connection: Connection,
    /// What has come and rustls has not taken yet, from `at` on: it takes 4 KiB at a time.
    incoming: Vec<u8>,
    at: usize,
    /// Decrypted bytes that nobody has read yet.
    unread: usize,
    ending: bool,
    begun: bool,
    /// Where the other side is, for messages.
    peer: String,
    /// Whose certificate it has proven to have.
    subject: Option<String>,
}

impl Session {
    pub(super) fn client(tls: &TlsClient, peer: &str) -> io::Result<Self> {
        let made = ClientConnection::new(tls.config.clone(), tls.name.clone());
        Ok(Self::new(made.map_err(io::Error::other)?.into(), peer))
    }

    pub(super) fn server(tls: &TlsServer, peer: &str) -> io::Result<Self> {
        let made = ServerConnection::new(tls.config.clone());
        Ok(Self::new(made.map_err(io::Error::other)?.into(), peer))
    }

    fn new(mut connection: Connection, peer: &str) -> Self {
        connection.set_buffer_limit(Some(HELD));
        let (incoming, at, unread, peer) = (Vec::new(), 0, 0, peer.to_owned());
        Self { connection, incoming, at, unread, ending: false, begun: false, peer, subject: None }
    }

    /// Who the other side is, once that is proven.
    pub(super) fn subject(&self) -> Option<&str> {
        self.subject.as_deref()
    }

    /// What the socket must be watched for so that it gets on.
    pub(super) fn interest(&self) -> Interest {
        Interest { read: self.connection.is_handshaking(), write: self.connection.wants_write(), edge: false }
    }

    /// Bytes of memory it takes, as far as they are known.
    pub(super) fn buffered(&self) -> u64 {
        self.incoming.capacity() as u64
    }

    /// Whether the other side has said anything.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    pub(super) fn pending(&self) -> bool {
        self.unread > 0 || self.at < self.incoming.len()
    }

    /// Both sides have proven who they are, as far as this side can know: the other may still refuse ours.
    pub(super) fn greet(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        loop {
            if !self.push(socket)? || !self.connection.is_handshaking() {
                return Ok(!self.connection.is_handshaking() && !self.connection.wants_write());
            }
            match self.pull(socket) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    pub(super) fn read(&mut self, socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        let mut done = 0;
        loop {
            match self.connection.reader().read(into.get_mut(done..).unwrap_or_default()) {
                Ok(count) => {
                    self.unread = self.unread.saturating_sub(count);
                    done += count;
                    if count == 0 || done == into.len() {
                        return Ok(done);
                    }
                }
                // What is said of more than that is said again the next time.
                Err(_) if done > 0 && self.at == self.incoming.len() => return Ok(done),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.pull(socket) {
                    Err(_) if done > 0 => return Ok(done),
                    pulled => pulled?,
                },
                Err(_) if done > 0 => return Ok(done),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(io::Error::new(error.kind(), "it was cut: closed without a word"));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes what has come, one piece of it.
    fn pull(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        // The other side may be waiting for it. If it takes nothing any more, its last word is still to be read.
        let _ = self.push(socket);
        let greeting = self.connection.is_handshaking();
        let mut end = false;
        if self.at == self.incoming.len() {
            self.at = 0;
            // A stranger gets less memory.
            self.incoming.resize(if greeting { RECEIVED_FIRST } else { RECEIVED }, 0);
            let came = Socket(socket).read(&mut self.incoming);
            self.incoming.truncate(*came.as_ref().unwrap_or(&0));
            self.begun |= !self.incoming.is_empty();
            end = match came {
                Ok(count) => count == 0,
                Err(error) if greeting && error.kind() == io::ErrorKind::ConnectionReset => true,
                Err(error) => {
                    // An idle connection takes nothing.
                    self.incoming = Vec::new();
                    return Err(error);
                }
            };
        }
        self.feed()?;
        match self.connection.process_new_packets() {
            Ok(state) => {
                self.unread = state.plaintext_bytes_to_read();
                if greeting && !self.connection.is_handshaking() {
                    let chain = self.connection.peer_certificates().unwrap_or_default();
                    if let Some(Ok(subject)) = chain.first().map(Subject::of) {
                        tracing::info!("TLS with {}: it is {}", self.peer, subject.text());
                        self.subject = Some(subject.text().to_owned());
                    }
                }
            }
            Err(error) => {
                // It is told why.
                let _ = self.push(socket);
                drain(socket);
                return Err(io::Error::new(io::ErrorKind::InvalidData, explained(&error, greeting)));
            }
        }
        if end && greeting {
            let why = "TLS: it closed the connection without a word; is --tls given there?";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        // Answers of the handshake; the rest goes when there is room.
        let _ = self.push(socket);
        Ok(())
    }

    /// Gives rustls of what has come what it takes before it must decrypt: a record, or the end if nothing is there.
    fn feed(&mut self) -> io::Result<()> {
        for fed in 0.. {
            let mut rest = self.incoming.get(self.at..).unwrap_or_default();
            match self.connection.read_tls(&mut rest) {
                Ok(0) => break,
                Ok(count) => self.at += count,
                // It is full.
                Err(_) if fed > 0 => break,
                Err(error) => return Err(error),
            }
            if self.at == self.incoming.len() {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn write(&mut self, socket: BorrowedFd<'_>, from: &[IoSlice<'_>]) -> io::Result<usize> {
        if from.iter().all(|slice| slice.is_empty()) {
            return Ok(0);
        }
        let mut taken = self.connection.writer().write_vectored(from)?;
        let pushed = self.push(socket)?;
        if taken == 0 && pushed {
            taken = self.connection.writer().write_vectored(from)?;
            self.push(socket)?;
        }
        if taken == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(taken) }
    }

    /// Sends what is held back; true when nothing is left that could be sent now.
    pub(super) fn push(&mut self, socket: BorrowedFd<'_>) -> io::Result<bool> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut Socket(socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if self.ending {
            super::shut(socket)?;
        }
        Ok(true)
    }

    pub(super) fn end(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        if !self.ending {
            self.connection.send_close_notify();
            self.ending = true;
        }
        self.push(socket).map(drop)
    }
}

/// Throws away what has come.
fn drain(socket: BorrowedFd<'_>) {
    let mut waste = [0; 4096];
    for _ in 0..DRAINED / waste.len() {
        if !matches!(Socket(socket).read(&mut waste), Ok(1..)) {
            break;
        }
    }
}

/// What went wrong between the two, and what to do about it.
fn explained(error: &rustls::Error, greeting: bool) -> String {
    let text = match error {
        rustls::Error::InvalidMessage(_) if greeting => {
            "it does not speak TLS; is --tls given there?".to_owned()
        }
        rustls::Error::NoCertificatesPresented => {
            "it has no certificate; --tls-cert there gives one".to_owned()
        }
        rustls::Error::InvalidCertificate(why) => theirs(why),
        rustls::Error::AlertReceived(alert) => ours(*alert),
        other => other.to_string(),
    };
    format!("TLS: {text}")
}

/// Their certificate, as we see it.
fn theirs(why: &CertificateError) -> String {
    match why {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet; are the clocks right?".to_owned()
        }
        CertificateError::Revoked => "its certificate is revoked (--tls-cacrl)".to_owned(),
        // Nobody knows what has been revoked since.
        CertificateError::ExpiredRevocationList | CertificateError::ExpiredRevocationListContext { .. } => {
            "the revocation list (--tls-cacrl) has expired; get a new one from the CA".to_owned()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "its certificate is not signed by the CA in --tls-cacert".to_owned()
        }
        CertificateError::NotValidForName => {
            "its certificate is not for the name in --address; --tls-no-cn-verify would accept it".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            let shown: Vec<String> = presented.iter().take(4).map(|name| named(name)).collect();
            let has = if shown.is_empty() { "no name (subjectAltName)".to_owned() } else { shown.join(", ") };
            format!("its certificate is not for {expected}: it has {has}; --tls-no-cn-verify would accept it")
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is not for this side of a connection (extendedKeyUsage)".to_owned()
        }
        CertificateError::Other(OtherError(why)) => format!("its certificate is refused: {why}"),
        other => format!("its certificate is refused: {other}"),
    }
}

/// What rustls calls `DnsName("x")`, in one safe line.
fn named(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(80).collect()
}

/// Our certificate, as they see it.
fn ours(alert: AlertDescription) -> String {
    let why = match alert {
        AlertDescription::CertificateExpired => "it has expired",
        AlertDescription::CertificateRevoked => "it is revoked",
        AlertDescription::UnknownCA => {
            "it is not signed by the CA there, or the revocation list there has expired"
        }
        AlertDescription::CertificateRequired => "it was not sent",
        AlertDescription::UnsupportedCertificate => {
            "it is not for this side of a connection (extendedKeyUsage)"
        }
        AlertDescription::CertificateUnknown => {
            "whom it names may not enter (--tls-allow there), or it cannot be read; the log there says why"
        }
        AlertDescription::BadCertificate | AlertDescription::AccessDenied => "the log there says why",
        AlertDescription::DecryptError => {
            "its signature is wrong; is the CA there another one of the same name?"
        }
        other => return format!("the other side refused: {other:?}"),
    };
    format!("the other side refused our certificate (--tls-cert): {why}")
}

/// Do the first bytes of a connection look like TLS, where something else was expected?
pub fn looks_like_tls(first: &[u8]) -> bool {
    // A record's type (handshake or alert) and the major version.
    matches!(first, [0x15 | 0x16, 3, ..])
}

#[cfg(test)]
pub(crate) mod tests;
