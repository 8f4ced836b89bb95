//! A client for one bucket: address, trust, credentials.
//!
//! Invariants: the SDK neither retries nor ends a slow body by itself (`attempt` does, by deadlines), and adds no checksums
//! that older servers stumble over. TLS is rustls with ring; without TLS none of it is loaded.

use super::bucket::BucketConfig;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::provider_config::ProviderConfig;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Builder, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    SharedCredentialsProvider, SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use kvd_proto::Error;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use std::time::Duration;

/// A client; it connects when it is used. Public for those who measure the SDK alone beside a `Bucket`.
pub async fn client(config: &BucketConfig) -> Result<Client, Error> {
    let region = Region::new(config.region.clone());
    let mut builder = Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .credentials_provider(credentials(config, &region).await?)
        .http_client(http_client(config)?)
        .region(region)
        .force_path_style(config.path_style)
        .retry_config(RetryConfig::disabled())
        .timeout_config(
            TimeoutConfig::builder().connect_timeout(Duration::from_millis(config.timeout_ms)).build(),
        )
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if !config.endpoint.is_empty() {
        builder = builder.endpoint_url(&config.endpoint);
    }
    Ok(Client::from_conf(builder.build()))
}

async fn credentials(config: &BucketConfig, region: &Region) -> Result<SharedCredentialsProvider, Error> {
    if let Some((key, secret)) = &config.keys {
        return Ok(SharedCredentialsProvider::new(Credentials::new(key, secret, None, None, "kvd.toml")));
    }
    // Whoever gives credentials out is not behind the bucket's endpoint, and has the system's trust.
    let provider = ProviderConfig::without_region()
        .with_region(Some(region.clone()))
        .with_http_client(https_client(aws_smithy_http_client::Builder::new(), TrustStore::default())?);
    Ok(SharedCredentialsProvider::new(DefaultCredentialsChain::builder().configure(provider).build().await))
}

fn http_client(config: &BucketConfig) -> Result<SharedHttpClient, Error> {
    let builder = aws_smithy_http_client::Builder::new().pool_max_idle_per_host(config.requests_max);
    if config.endpoint.starts_with("http://") {
        return Ok(builder.build_http());
    }
    match &config.ca_pem {
        None => https_client(builder, TrustStore::default()),
        Some(pem) => {
            check_pem(pem)?;
            https_client(builder, TrustStore::empty().with_pem_certificate(pem.clone()))
        }
    }
}

fn https_client(
    builder: aws_smithy_http_client::Builder,
    trust: TrustStore,
) -> Result<SharedHttpClient, Error> {
    let context = TlsContext::builder().with_trust_store(trust).build();
    let context = context.map_err(|error| not_certificates(error.to_string()))?;
    Ok(builder.tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(context).build_https())
}

/// The SDK takes what is no certificate for a broken promise and panics, so it is looked at first.
fn check_pem(pem: &[u8]) -> Result<(), Error> {
    let certificates: Vec<CertificateDer> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| not_certificates(error.to_string()))?;
    match RootCertStore::empty().add_parsable_certificates(certificates) {
        (0, 0) => Err(not_certificates("it has none")),
        (_, 0) => Ok(()),
        (_, bad) => Err(not_certificates(format!("{bad} of them cannot be read"))),
    }
}

fn not_certificates(why: impl Into<String>) -> Error {
    Error::invalid(
        "s3.ca_file",
        format!("not certificates: {}", why.into()),
        "give a file of PEM certificates",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `localhost`, signed by itself, until 2126.
    const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----\n\
        MIIBlDCCATugAwIBAgIUcBQKaUUfVMzAzAKyk5xojp12WjcwCgYIKoZIzj0EAwIw\n\
        FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMTE1Mjg0OVoYDzIxMjYxMDI4\n\
        MTUyODQ5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO\n\
        PQMBBwNCAAR0fxoi2ASmnJ6KNWbXv0SGkahC8rQmB5FQ1iKDneMxF5IYUTI2w4g/\n\
        wDjI+y8nb+ag6jvHDT6m6PIAP6YY4Gwho2kwZzAdBgNVHQ4EFgQUp3N2urDWFPbY\n\
        okq3fQOX/YVPIIMwHwYDVR0jBBgwFoAUp3N2urDWFPbYokq3fQOX/YVPIIMwDwYD\n\
        VR0TAQH/BAUwAwEB/zAUBgNVHREEDTALgglsb2NhbGhvc3QwCgYIKoZIzj0EAwID\n\
        RwAwRAIgYbENP7oUDadxGldGQyPwROM6fLZKJsipQjf6yd6h1RUCIEsZTcaaKCUg\n\
        HvnmeHsd5tYxtN76xfeM3jFKYcNbH3iw\n\
        -----END CERTIFICATE-----";

    #[test]
    fn what_is_no_certificate_is_said_to_be_none() {
        let block = |body: &str| format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        let half = &CERTIFICATE[..CERTIFICATE.len() / 2];
        for bad in
            ["", "hello", half, &block("!!!"), &block("AAAA"), &format!("{CERTIFICATE}\n{}", block("MAQB"))]
        {
            let error = check_pem(bad.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("not certificates"), "{bad}: {error}");
        }
        assert!(check_pem(&[0xFF]).is_err());
        assert_eq!(check_pem(CERTIFICATE.as_bytes()), Ok(()));
    }

    #[tokio::test]
    async fn a_client_with_a_certificate_of_its_own_is_made() {
        let config = BucketConfig { ca_pem: Some(CERTIFICATE.into()), ..BucketConfig::default() };
        client(&config).await.unwrap();
        let refused = client(&BucketConfig { ca_pem: Some(b"hello".to_vec()), ..config }).await;
        assert_eq!(refused.unwrap_err().field, "s3.ca_file");
    }
}
