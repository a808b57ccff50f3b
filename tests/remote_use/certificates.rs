//! A CA with certificates of its own, and lists of those it has taken back.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};

pub struct Ca {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    pub fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.join("ca.pem"), issuer.pem()).unwrap();
        Self { dir: dir.to_owned(), issuer }
    }

    fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// The options of one who has a certificate for 127.0.0.1 with this number.
    pub fn member(&self, serial: u64) -> Vec<String> {
        self.member_for(serial, &[])
    }

    /// The same for one of `uses`; for everything where there is none.
    pub fn member_for(&self, serial: u64, uses: &[ExtendedKeyUsagePurpose]) -> Vec<String> {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, format!("member {serial}"));
        params.extended_key_usages = uses.to_vec();
        params.serial_number = Some(SerialNumber::from(serial));
        let key = KeyPair::generate().unwrap();
        let (cert_path, key_path) =
            (self.path(&format!("{serial}.pem")), self.path(&format!("{serial}.key")));
        fs::write(&cert_path, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        fs::write(&key_path, key.serialize_pem()).unwrap();
        let files = ["--tls", "--tls-cacert", &self.path("ca.pem"), "--tls-cert", &cert_path, "--tls-key"];
        files.iter().copied().chain([key_path.as_str()]).map(str::to_owned).collect()
    }

    /// The option for a list with these numbers that is good until `year`.
    pub fn list(&self, serials: &[u64], year: i32) -> [String; 2] {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2001, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2001, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let path = self.path(&format!("list-{serials:?}-{year}.pem"));
        fs::write(&path, list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
        ["--tls-cacrl".to_owned(), path]
    }
}
