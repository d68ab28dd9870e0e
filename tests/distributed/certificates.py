"""Certificate authorities for tests of mutual TLS."""

import datetime
import ipaddress
import pathlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infinite_llm.distributed.transport.grpc_options import TlsFiles

_DAY = datetime.timedelta(days=1)


class Authority:
  """Issues certificates for 127.0.0.1."""

  def __init__(self, folder: pathlib.Path, name: str):
    self._folder = folder
    self._name = name
    self._key = ec.generate_private_key(ec.SECP256R1())
    self._certificate = self._sign(name, self._key, is_authority=True)
    self.path = self._write("authority", _pem(self._certificate))

  def issue(self, name: str) -> TlsFiles:
    """Files of a new member."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = self._sign(name, key, is_authority=False)
    private = key.private_bytes(
      serialization.Encoding.PEM,
      serialization.PrivateFormat.PKCS8,
      serialization.NoEncryption(),
    )
    return TlsFiles(
      certificate=self._write(f"{name}-certificate", _pem(certificate)),
      key=self._write(f"{name}-key", private),
      authority=self.path,
    )

  def _sign(
    self, name: str, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
  ) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = (
      x509.CertificateBuilder()
      .subject_name(_common_name(name))
      .issuer_name(_common_name(self._name))
      .public_key(key.public_key())
      .serial_number(x509.random_serial_number())
      .not_valid_before(now - _DAY)
      .not_valid_after(now + _DAY)
      .add_extension(
        x509.BasicConstraints(ca=is_authority, path_length=None), critical=True
      )
      .add_extension(x509.SubjectAlternativeName([address]), critical=False)
    )
    return builder.sign(self._key, hashes.SHA256())

  def _write(self, name: str, content: bytes) -> pathlib.Path:
    path = self._folder / f"{self._name}-{name}.pem"
    path.write_bytes(content)
    return path


def _common_name(name: str) -> x509.Name:
  return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _pem(certificate: x509.Certificate) -> bytes:
  return certificate.public_bytes(serialization.Encoding.PEM)
